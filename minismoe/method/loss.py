"""Cross-entropy of the supervised tokens, without the full logits tensor.

A vocabulary of 50,000 makes logits the largest tensor of a training step, and many tokens have no
loss. So the head runs on supervised positions only, a chunk at a time, and a chunk keeps the
gradient of its hidden states in place of its logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100                   # the label of an unsupervised token
CHUNK = 1 << 25                 # logits held at a time: 128 MiB of float32


class _HeadLoss(torch.autograd.Function):
    """losses (S,) of hidden (S, D) under a frozen head (V, D). Plainly, with targets (S,):

        logits = hidden @ head.T;  losses = logits.logsumexp(-1) - logits[targets]

    The gradient is that of smoothed targets, by `smoothing` (S,): 1 - smoothing for the target
    itself, and smoothing / V for each token. Compared in tests/method/test_loss.py::
    test_equals_cross_entropy_of_full_logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor,
                smoothing: Tensor | None) -> Tensor:
        """Returns losses (S,); keeps the gradient (S, D) of hidden for the backward."""
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = _by_chunks(hidden, head, targets, gradient, smoothing)
        if gradient is not None:
            if smoothing is not None:
                gradient -= smoothing[:, None].to(head.dtype) * head.mean(0)
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_losses[:, None].to(gradient.dtype), None, None, None


def _by_chunks(hidden: Tensor, head: Tensor, targets: Tensor, gradient: Tensor | None = None,
               smoothing: Tensor | None = None, likeliest: Tensor | None = None) -> Tensor:
    """Losses (S,), by CHUNK logits; fills the gradient (S, D) of hidden, without the part that all
    positions share, and whether each target is the likeliest token, (S,)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    step = max(1, CHUNK // head.shape[0])
    for i in range(0, len(hidden), step):
        part, target = slice(i, i + step), targets[i:i + step, None]
        log_q = (hidden[part] @ head.T).to(dtype)
        log_q -= log_q.logsumexp(-1, keepdim=True)
        losses[part] = -log_q.gather(1, target).squeeze(1)
        if likeliest is not None:
            likeliest[part] = log_q.argmax(-1) == target[:, 0]
        if gradient is not None:             # q - target, but for smoothing / V everywhere
            kept = torch.ones_like(losses[part]) if smoothing is None else 1 - smoothing[part]
            log_q.exp_().scatter_add_(1, target, -kept[:, None].to(dtype))
            gradient[part] = log_q.to(head.dtype) @ head
        del log_q                            # before the next chunk's is computed
    return losses


def head_losses(hidden: Tensor, head: Tensor, targets: Tensor, smoothing: Tensor | None = None,
                ) -> Tensor:
    """Cross-entropy (S,) of hidden states (S, D) under a head (V, D); targets are (S,). Under a
    frozen head, the gradient is that of targets that are smoothed by `smoothing` (S,), each by its
    own (Szegedy et al. 2016, arXiv 1512.00567).
    """
    if head.requires_grad and torch.is_grad_enabled():       # the head itself is being trained
        logits = F.linear(hidden, head)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="none")
    return _HeadLoss.apply(hidden, head, targets, smoothing)


def head_scores(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`head_losses` without gradients, and whether each target is the likeliest token, (S,)."""
    likeliest = torch.empty_like(targets, dtype=torch.bool)
    return _by_chunks(hidden, head, targets, likeliest=likeliest), likeliest


def supervised_losses(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor,
                      ) -> tuple[Tensor, Tensor]:
    """Loss (S,) of each supervised token of a batch, and the batch row (S,) that it is in.

    input_ids, attention_mask and labels are (B, T); labels are IGNORE where unsupervised, and
    aligned with input_ids (the shift happens here). `model`, ours or of `transformers`, has a
    decoder `.model` under an `.lm_head`; ours takes a batch on the CPU without a wait for the
    device. Raises ValueError for a head that is not supported.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1):
            raise ValueError(f"{kind} transforms its logits ({name}): the loss does not support it")
    if getattr(model.lm_head, "bias", None) is not None:
        raise ValueError(f"the head of {kind} has a bias: the loss does not support it")
    needed, rows, targets = supervised_tokens(attention_mask, labels)
    hidden = model.model(input_ids=input_ids, attention_mask=attention_mask)
    hidden = getattr(hidden, "last_hidden_state", hidden).flatten(0, 1)          # (B * T, D)
    at, targets = (to_device(t, hidden.device) for t in (needed.flatten().nonzero()[:, 0], targets))
    head = model.lm_head.weight
    head = head if isinstance(head, Tensor) else head.dense()        # stored in another form
    return head_losses(hidden.index_select(0, at), head, targets), rows


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, without a wait. MPS may read a source that is freed by then
    (PyTorch's issue 189690), and a CPU what has not arrived, so there the copy waits."""
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))


def supervised_tokens(attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The positions (B, T) that predict a supervised token; of each such token, (S,), the batch row
    and the token. The first token after left padding is predicted by a pad, so it does not count.
    """
    needed = attention_mask.bool() & F.pad(labels[:, 1:] != IGNORE, (0, 1))
    rows, columns = needed.nonzero(as_tuple=True)
    return needed, rows, labels[rows, columns + 1]
