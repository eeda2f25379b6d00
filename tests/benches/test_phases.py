"""Steps beside the passes of their networks: what is noted of a step, and that running it alone changes nothing."""

from __future__ import annotations

import json

import torch
from torch import nn

from benches import phases


def pieces():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(2, 3, 8, 8))
    return net, torch.optim.Adam(net.parameters()), torch.randn(4, 3, 8, 8)


def test_the_tape_notes_whole_networks_and_optimisers():
    net, opt, x = pieces()
    frozen = nn.Linear(2, 2).requires_grad_(False).eval()
    with phases.Tape().open() as tape:
        y = frozen(net(x))
        with torch.no_grad():
            net(x.requires_grad_())
        y.sum().backward()
        opt.step()
    first, second, third = tape.passes
    assert (first.net, second.net, third.net) == (net, frozen, net) and tape.optimisers == [opt]
    assert (first.grad, first.wanted, len(first.params), first.training) == (True, [False], 6, True)
    assert (second.grad, second.wanted, second.params, second.training) == (True, [True], [], False)
    assert (third.grad, third.wanted, third.params) == (False, [False], [])
    with phases.Tape().open() as other:
        pass
    net(x)
    assert not other.passes and len(tape.passes) == 3


def test_passes_alone_leave_weights_modes_and_flags():
    net, opt, x = pieces()
    with phases.Tape().open() as tape:
        net(x).sum().backward()
        opt.step()
        opt.zero_grad()
    net.eval().requires_grad_(False)
    before = [p.clone() for p in net.parameters()]
    assert tape.alone(True) > 0
    assert all(torch.equal(p, q) and p.grad is None and not p.requires_grad for p, q in zip(net.parameters(), before))
    assert not any(m.training for m in net.modules())


def test_rows_of_methods(tmp_path, capsys):
    words = ["--out", str(tmp_path), "--batch", "4", "--epochs", "1", "--only", "fast", "--only", "noise", "--only", "cde"]
    assert phases.main(words) == 0
    rows = json.loads((tmp_path / "phases.json").read_text())["rows"]
    found = {(r["method"], r["phase"]): r for r in rows}
    hosts = {(name, phase) for name in ("fast", "cde") for phase in ("synthesis", "distillation")}
    assert found.keys() == hosts | {("noise", "distillation")}
    fast = found["fast", "synthesis"]
    assert fast["steps"] == ["adapt"] and {"start", "meta_update"} <= fast["others"].keys()
    assert all(abs(r["ratio"] * r["passes_ms"] / r["ms"] - 1) < 0.01 for r in rows)
    assert "learn" in capsys.readouterr().out


def test_a_pass_with_other_weights_that_is_differentiated_twice_is_counted_as_such():
    net, _, x = pieces()
    theta = {n: p * 1.0 for n, p in net.named_parameters()}
    with phases.Tape().open() as tape:
        loss = torch.func.functional_call(net, theta, (x,)).square().sum()
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        net(x)
    torch.stack([g.square().sum() for g in grads]).sum().backward()
    first, second = tape.passes
    assert first.others.keys() == theta.keys() and first.twice and not second.others and not second.twice
    seen = []
    plain = torch.autograd.grad
    try:
        torch.autograd.grad = lambda *args, **kw: seen.append(kw.get("create_graph")) or plain(*args, **kw)
        first.run(False)
    finally:
        torch.autograd.grad = plain
    assert seen == [True, None]
