"""The method on one page, in plain loops. Read this first, then run: python -m minismoe.reference

To fine-tune a frozen model on several tasks, measure how sensitive each matrix is to each task (1),
let each task vote for its most sensitive matrices, where a vote is one LoRA expert (2), train the
experts (3), and freeze the routing, so that the experts of a matrix become one plain LoRA (4).
A matrix W with E = 2 experts of rank r; for one token, it reads x and writes y:

            +--- W  (out, in) ---------------------------------------+
            |                                                        |
     x -----+--- A_1 (r, in) --- B_1 (r, out) --- times g_1(x) --- (sum) ---> y
    (in)    +--- A_2 (r, in) --- B_2 (r, out) --- times g_2(x) ------+      (out)
            |                                          ^
            +--- router (E, in) --- softmax of the k largest

Sources: LoRA-SMoE (Xu and Diao 2025, arXiv 2505.06272), Switch (2101.03961), Mixtral (2401.04088).
minismoe/method computes the same, fast; tests/method compares both. N tokens; k active experts.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


# 1. Probe (LoRA-SMoE). L_i is the mean loss of sample i over its supervised tokens:
#    s[t, W]  =  sum over the samples i of task t of  || dL_i / dW ||_F^2
def sensitivity(weights: Mapping[str, Tensor], losses: Iterable[Tensor]) -> dict[str, float]:
    """{module: s} of one task, from the losses L_i of its samples, one after another."""
    s = dict.fromkeys(weights, 0.0)
    for loss in losses:
        for name, gradient in zip(s, torch.autograd.grad(loss, list(weights.values()))):
            s[name] += gradient.square().sum().item()
    return s


# 2. Vote (LoRA-SMoE). Matrices compete within a group; of equal scores the first one wins:
#    E[W]  =  number of tasks t for which s[t, W] is among the keep * size largest of W's group
def vote(scores: Mapping[str, Mapping[str, float]], groups: Sequence[Sequence[str]],
         keep: float) -> dict[str, int]:
    """{module: experts} from {task: {module: s}}."""
    experts = {module: 0 for group in groups for module in group}
    for s in scores.values():
        for group in groups:
            votes = max(1, int(keep * len(group) + 0.5 + 1e-9))      # 0.145 * 100 is 14.499...
            for module in sorted(group, key=lambda module: -s[module])[:votes]:
                experts[module] += 1
    return experts


# 3. Train (LoRA-SMoE, Mixtral). Without a router (E = 1) the only gate is 1:
#    y     =  W x  +  scaling * sum over experts e of  g_e(x) B_e^T A_e x
#    g(x)  =  softmax over the k largest of the E router logits, 0 elsewhere
class Mixture(nn.Module):
    """A frozen linear layer with experts: lora_A (E, r, in), lora_B (E, r, out), router (E, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
                 router: Tensor | None, top_k: int, scaling: float):
        super().__init__()
        self.weight, self.bias, self.lora_A, self.lora_B = weight, bias, lora_A, lora_B
        self.router, self.top_k, self.scaling = router, top_k, scaling
        self.router_logits: Tensor | None = None             # (N, E) of the last forward

    def gates(self, x: Tensor) -> Tensor:
        """g(x), (N, E), of tokens x (N, in)."""
        if self.router is None:
            return x.new_ones(len(x), 1)
        self.router_logits = logits = x @ self.router.T
        return logits.masked_fill(~chosen(logits, self.top_k), -torch.inf).softmax(dim=-1)

    def outputs(self, x: Tensor) -> list[Tensor]:
        """What each expert gives before its gate, (N, out): scaling * B_e^T A_e x."""
        return [self.scaling * (x @ A.T @ B) for A, B in zip(self.lora_A, self.lora_B)]

    def added(self, x: Tensor) -> Tensor:
        """What all experts add to W x, (N, out)."""
        gated = [g[:, None] * y for g, y in zip(self.gates(x).T, self.outputs(x))]
        return torch.stack(gated).sum(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out)."""
        added = self.added(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return nn.functional.linear(x, self.weight, self.bias) + added


def chosen(logits: Tensor, k: int) -> Tensor:
    """(N, E) of true and false: the k experts of a token's largest logits; of equal, the first."""
    return logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < k


# Balance loss of a matrix (Switch, equations 4 to 6; top-k form of Mixtral); 1 is perfect balance:
#    E * sum over experts e of f_e P_e,   f_e = share of the k * N choices that went to expert e,
#                                         P_e = mean of softmax(logits)_e over the tokens
def balance_loss(logits: Tensor, k: int) -> Tensor:
    """The loss of router logits (N, E)."""
    E = logits.shape[1]
    f = chosen(logits, k).to(logits.dtype).mean(dim=0) / min(k, E)
    return E * (f * logits.softmax(dim=-1).mean(dim=0)).sum()


# 4. Freeze (ours). A and B are all experts' stacked. Find the A' (E*r, in) of one plain LoRA:
#    A'  =  argmin  sum over tokens x of  || y - scaling * B^T A' x ||^2,   y = what the experts add
#    mean    A' = each A_e times c_e,  c = mean gates over the tokens
#    gates   A' = each A_e times c_e,  c = argmin || y - sum over e of c_e scaling B_e^T A_e x ||^2
#    linear  A' = that of gates + S,  S = argmin || (g(x) - c) * A x - S x ||^2 + ridge || S ||^2
def fits(layer: Mixture, x: Tensor, ridge: float) -> dict[str, Tensor]:
    """{"mean", "gates", "linear": A' (E*r, in)} from tokens x (N, in)."""
    g, each = layer.gates(x), torch.stack(layer.outputs(x), dim=2)       # (N, E), (N, out, E)
    c = torch.linalg.lstsq(each.flatten(0, 1), layer.added(x).reshape(-1, 1)).solution
    A_mean = torch.cat([g[:, e].mean() * A for e, A in enumerate(layer.lora_A)])
    A_gates = torch.cat([c[e] * A for e, A in enumerate(layer.lora_A)])
    left = torch.cat([(g[:, e, None] - c[e]) * (x @ A.T) for e, A in enumerate(layer.lora_A)], 1)
    # The ridge, times the mean diagonal of x^T x, is `in` more equations: pull S = 0.
    pull = (ridge * x.square().sum(dim=0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    S = torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([left, 0 * pull @ A_gates.T])).solution
    return {"mean": A_mean, "gates": A_gates, "linear": A_gates + S.T}


def frozen(layer: Mixture, A: Tensor) -> Mixture:
    """The layer with one expert A' of rank E*r in place of E experts and a router."""
    B = layer.lora_B.flatten(0, 1)
    return Mixture(layer.weight, layer.bias, A[None], B[None], None, 1, layer.scaling)


def residual(layer: Mixture, A: Tensor, x: Tensor) -> float:
    """Share of the experts' output energy that A' misses: || y - y' ||^2 / || y ||^2."""
    y = layer.added(x)
    return ((y - frozen(layer, A).added(x)).square().sum() / y.square().sum()).item()


class Toy(nn.Module):
    """Two branches that meet: x (N, 16) -> (N, 4)."""
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.join: Any = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def branches(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x[:, :8]), self.right(x[:, 8:])], dim=1).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.join(self.branches(x)).tanh())


def main() -> None:
    """Two made-up tasks: in task 1 the right half of x is small, in task 2 the left half."""
    torch.manual_seed(5)
    torch.set_num_threads(1)
    model, x, y = Toy().requires_grad_(False), 2 * torch.randn(1024, 16), torch.empty(1024, 4)
    x[0::2, 8:] /= 20
    x[1::2, :8] /= 20
    tasks = {"task 1": torch.arange(0, 1024, 2), "task 2": torch.arange(1, 1024, 2)}
    for rows, branch in zip(tasks.values(), ("left", "right")):
        teacher = copy.deepcopy(model)             # whose answers are to be learnt
        for layer in (getattr(teacher, branch), teacher.join):
            layer.weight += 0.4 * torch.outer(*map(torch.randn, layer.weight.shape))
        y[rows] = teacher(x[rows])

    def loss(rows: Tensor) -> Tensor:
        return (model(x[rows]) - y[rows]).square().mean()

    def show(title: str, numbers: Mapping[str, float] | None = None) -> None:
        numbers = numbers or {task: loss(rows[384:]).item() for task, rows in tasks.items()}
        print(f"{title:48}", *(f"{name} {number:<7.2g}" for name, number in numbers.items()))

    layers: dict[str, Any] = dict(model.named_children())
    weights = {name: layer.weight.requires_grad_() for name, layer in layers.items()}
    scores = {task: sensitivity(weights, (loss(row[None]) for row in rows[:32]))
              for task, rows in tasks.items()}
    for task in tasks:
        show(f"1. sensitivity to {task}", scores[task])
    experts = vote(scores, [["left", "right"], ["join", "head"]], keep=0.5)
    show("2. experts: one a vote, each task votes for half", experts)
    model.requires_grad_(False)
    show("3. loss on held-out samples, before training")
    for name, layer in layers.items():
        E = experts[name]
        A = nn.Parameter(torch.randn(E, 2, layer.in_features) / 4)
        B = nn.Parameter(torch.zeros(E, 2, layer.out_features))          # at first they add nothing
        router = nn.Parameter(torch.randn(E, layer.in_features) / 50) if E > 1 else None
        new = Mixture(layer.weight, layer.bias, A, B, router, top_k=2, scaling=2.0)
        setattr(model, name, new if E > 0 else layer)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        batch_loss = loss(torch.randint(768, (128,)))
        (batch_loss + 0.001 * balance_loss(model.join.router_logits, k=2)).backward()
        optimizer.step()
    show("   after")
    layer, reads = model.join, model.branches(x)
    for kind, fit in fits(layer, reads[:768], ridge=1e-4).items():
        model.join = frozen(layer, fit)
        show(f"4. frozen by {kind}: join loses {residual(layer, fit, reads[768:]):.1%}; loss")


if __name__ == "__main__":
    main()
