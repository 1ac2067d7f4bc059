"""A fingerprint of a model's weights, recorded with its results."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that depend on names, shapes, dtypes and bits of all parameters, including adapters, and
    of the scales of 4-bit weights.

    Hashes two sums per parameter over its bits read as integers, one weighted by position. They are exact (modulo
    2^64), so they do not depend on device or number of threads, and far cheaper than hashing all bytes. The
    fingerprint distinguishes checkpoints; it is not cryptographically secure.
    """
    digest = hashlib.sha256()
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        # The scales of a quantized "NAME.weight" are entries such as "NAME.weight.absmax", not parameters.
        constants = {name: tensor for name, tensor in model.state_dict().items() if ".weight." in name}
        for name, parameter in sorted((parameters | constants).items()):
            bits = parameter.detach().contiguous().view(-1).view(_INTEGERS[parameter.element_size()])
            total, weighted = 0, 0
            for start in range(0, bits.numel(), 2**24):
                part = bits[start : start + 2**24].to(torch.int64)
                places = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
                total += int(part.sum())
                weighted += int((part * places).sum())
            digest.update(repr((name, tuple(parameter.shape), str(parameter.dtype), total, weighted)).encode())
    return digest.hexdigest()[:16]
