"""One replica: serves one GGUF file or checkpoint.

Responsibility: the engine process, its front end and the gRPC face. Does not
know endpoints or runs.
"""
