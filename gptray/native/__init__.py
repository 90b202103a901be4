"""The C++ library for training in bf16 and for decoding on CPUs; does not load torch."""
