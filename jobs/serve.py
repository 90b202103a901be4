"""Serve a model over HTTP, on Ray Serve, to any client that speaks OpenAI's completions.

python jobs/serve.py                                     the newest run, http://127.0.0.1:8000
python jobs/serve.py serve.model=<run, model folder or hub id> serve.port=8080
python jobs/serve.py ... serve.num_replicas=2 serve.api_key_file=keys.txt serve.host=0.0.0.0
"""

import sys

from gptray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("serve", doc=__doc__ or ""))
