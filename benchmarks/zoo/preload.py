"""What the server that processes are forked from has imported: what every model of the sweep would import anew."""

import sys
from importlib.util import find_spec

import benchmarks.preload  # noqa: F401 (hides a torchvision that need not fit this torch, before anything else)

if find_spec("peft") is not None:
    import peft  # noqa: F401
if find_spec("timm") is not None:
    from benchmarks.zoo import images

    images.timm()  # over a stand-in for torchvision
    sys.modules["torchvision"] = None
