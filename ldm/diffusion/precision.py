"""Which numbers are exact: noise levels are float64 until they meet an image, images are float32 at least."""

import torch


def exact(value) -> torch.Tensor:
    """`value` (number or tensor) in float64, on its own device where that has float64, else on the CPU."""
    if not torch.is_tensor(value):
        return torch.as_tensor(value, dtype=torch.float64, device="cpu")
    return (value.cpu() if value.device.type == "mps" else value).double()


def expand(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A value per sample, (B,) or 0-d, in the type, on the device and with the number of dimensions of x."""
    # The type first: not every device has float64. From the CPU to CUDA the copy does not wait for the GPU.
    value = value.to(x.dtype).to(x.device, non_blocking=x.is_cuda)
    return value.reshape(-1, *[1] * (x.ndim - 1))


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """Half-precision x in float32, any other as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
