"""Hidden-state capture for SGLang and vLLM. Switched on by the environment variable SPECFORGE_CAPTURE:

`tmpfs:/dev/shm/some-directory` (one host) or `mooncake:tcp://HOST:PORT` (a store that other hosts reach).
"""

VERSION = "0.3.0"
