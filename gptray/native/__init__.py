"""One C++ library, for training in bf16 and for decoding on CPUs; loads no torch."""
