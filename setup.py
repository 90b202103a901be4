"""Says that a Python is too old; its pip would speak of conflicts between packages instead."""

import sys

from setuptools import setup

if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit("gptray needs Python 3.11 to 3.14, and this is Python " + found)
setup()
