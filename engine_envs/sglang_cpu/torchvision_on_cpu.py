"""Lets the torchvision wheel (a CUDA build, there is no other) be imported beside a CPU build of torch.

torchvision registers shapes for two operators its missing C++ library would define. Declaring them first, at the
moment torchvision is imported, is enough; nobody calls them. Loaded by a .pth file, so it must not import torch early.
"""

import sys
from importlib.abc import MetaPathFinder


class _DeclareOperators(MetaPathFinder):
    library = None  # the declaration lives as long as this object

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            type(self).library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(operator + signature)
        return


sys.meta_path.insert(0, _DeclareOperators())
