"""What the tests of several processes run on each rank; `found` goes back to the test."""

import itertools
import os
import tempfile
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from problems import F64, cplx, real
from torch import nn

import bilevel as bl

RATE = bl.optim.SGD(lambda c: c["rate"], momentum=0.5)
N = 12  # samples
PARAMS = {"W": 0.3 * real(1, 3, 4), "v": real(2, 4)}
CONTROL = {"decay": 0.1 * real(3, 4) - 1, "rate": torch.tensor(0.2, dtype=F64)}
DECAY = {"decay": CONTROL["decay"]}
TRAIN, JUDGED = (real(4, N, 3), real(5, N)), (real(6, N, 3), real(7, N))


def predicted(w, x):
    return torch.tanh(x @ w["W"]) @ w["v"]


def inner(w, c, batch):
    squares = (c["decay"].exp() * w["v"] ** 2).sum() + c["decay"][0].exp() * (w["W"] ** 2).sum()
    return ((predicted(w, batch[0]) - batch[1]) ** 2).mean() / 2 + squares / 2


def outer(w, c, batch):
    return ((predicted(w, batch[0]) - batch[1]) ** 2).mean()


NET = bl.BilevelProblem(inner, outer)


def complex_inner(w, c, batch):
    A, y = batch
    return ((A @ w - y).abs() ** 2).mean() + (c.exp() * w.abs() ** 2).sum()


def complex_outer(w, c, batch):
    return ((batch[0] @ w - batch[1]).abs() ** 2).mean() + c.square().sum()


COMPLEX = (
    bl.BilevelProblem(complex_inner, complex_outer),
    cplx(8, 3),
    0.3 * real(9, 3),
    ((cplx(10, N, 3), cplx(11, N)), (cplx(12, N, 3), cplx(13, N))),
)


def solvers():
    """By name: a solver, its params, control and batches."""

    def net(method, rule=RATE, control=CONTROL, steps=5, batches=(TRAIN, JUDGED), **settings):
        settings = {"certificate": None, **settings}
        return bl.BilevelSolver(NET, rule, steps, method, **settings), PARAMS, control, batches

    exact = bl.Implicit(bl.linear.CG(rtol=1e-13))
    proximal = bl.optim.ProximalGradient(0.2, bl.prox.L1(0.01))
    searching = bl.optim.ProximalGradient(2.0, bl.prox.L1(0.01), line_search=True)
    skew = bl.Implicit(bl.linear.GMRES(rtol=1e-13))
    blocks = bl.MLM(checkpointing=bl.Checkpointing(snapshots=1, block=2))
    alternating = bl.ByStep(lambda t: (TRAIN, JUDGED)[t % 2])
    problem, start, shift, complex_batches = COMPLEX
    sgd = bl.optim.SGD(0.1)
    return {
        "MLM": net(bl.MLM()),
        "MLM in blocks": net(blocks, bl.optim.Adam(lambda c: c["rate"])),
        "MLM, graphs kept": net(bl.MLM(bl.Checkpointing(block=None))),
        "Unrolled": net(bl.Unrolled()),
        "OneStep": net(bl.OneStep()),
        "Penalty": net(bl.Penalty(64.0), bl.optim.SGD(0.2), DECAY, 10, on_failure="ignore"),
        "Implicit": net(exact, bl.optim.SGD(0.2), DECAY, 10),
        "Implicit, GMRES": net(skew, proximal, DECAY, 10),
        "Implicit, NormalCG": net(
            bl.Implicit(bl.linear.NormalCG(rtol=1e-13)), proximal, DECAY, 10, on_failure="ignore"
        ),
        "minibatches": net(bl.MLM(), batches=(bl.Minibatches(TRAIN, 6, seed=1), JUDGED)),
        "by step": net(bl.MLM(), batches=(alternating, JUDGED)),
        "FirstOrder": (
            bl.BilevelSolver(
                bl.BilevelProblem(
                    lambda w, c, b: outer(w, c, b) + (w["v"] ** 2).sum(),
                    outer,
                    start=lambda w, c: bl.tree.map_leaves(lambda x: x * c["scale"], w),
                ),
                bl.optim.SGD(0.2),
                3,
                bl.FirstOrder(),
                certificate=None,
            ),
            *(PARAMS, {"scale": torch.tensor(0.9, dtype=F64)}, (TRAIN, JUDGED)),
        ),
        "line search": net(
            bl.Implicit(bl.linear.GMRES(rtol=1e-13)), searching, DECAY, 10, on_failure="ignore"
        ),
        "complex": (
            bl.BilevelSolver(problem, sgd, 8, certificate=None),
            *(start, shift, complex_batches),
        ),
        "complex, certified": (
            bl.BilevelSolver(problem, sgd, 60, bl.Implicit()),
            *(start, shift, complex_batches),
        ),
    }


def distance(a, b):
    """Largest relative distance of two trees, leaf by leaf."""
    pairs = zip(bl.tree.leaves_of(a), bl.tree.leaves_of(b), strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def part(batch, rank, size):
    return bl.tree.map_leaves(lambda x: x.chunk(size)[rank], batch)


def hypergradients(rank, replicas, names=None):
    """Distances from one process, of what each method finds on several."""
    found = {}
    for name, (solver, params, control, batches) in solvers().items():
        if names is not None and name not in names:
            continue
        alone = solver.hypergradient(params, control, *batches)
        together = replace(solver, replicas=replicas).hypergradient(params, control, *batches)
        found[name] = distance(together.gradient, alone.gradient), float(together.value)
        if alone.certificate is not None:
            found["certificate"] = (
                abs(together.certificate.error_estimate - alone.certificate.error_estimate),
                together.certificate.trustworthy,
            )
    for name in ("MLM", "Unrolled", "Implicit"):
        if names is not None:
            continue
        solver, *given, batches = solvers()[name]
        outers = [outer, lambda w, c, b: (predicted(w, b[0]) - 1).cosh().mean()]
        alone = solver.hypergradients(*given, outers, *batches)
        together = replace(solver, replicas=replicas).hypergradients(*given, outers, *batches)
        for i, (one, all_) in enumerate(zip(alone, together, strict=True)):
            found[f"{name}, outer {i}"] = distance(all_.gradient, one.gradient), float(all_.value)
    own = [part(batch, rank, replicas.size) for batch in (TRAIN, JUDGED)]
    alone = solvers()["MLM"][0].hypergradient(PARAMS, CONTROL, TRAIN, JUDGED)
    solver = replace(solvers()["MLM"][0], replicas=replicas)
    mine = solver.hypergradient(PARAMS, CONTROL, *own)
    found["parts of one's own"] = distance(mine.gradient, alone.gradient), float(mine.value)
    return found


def build(batch):
    x, y = batch

    def step(u, c, t):
        return torch.tanh(u @ c["W"] + c["b"]) + u

    def cost(u, c):
        return ((u - y) ** 2).mean() + 0.01 * (c["W"] ** 2).sum()

    return bl.ControlProblem(bl.Map(step), cost, 3, lambda u, c, t: 0.1 * (u**2).mean()), x


def controls(rank, replicas):
    """Distances of solved controls, and of costs, from one process."""
    start = {"W": 0.3 * real(1, 3, 3), "b": real(2, 3)}
    batches = [(real(10 + i, N, 3), real(20 + i, N, 3)) for i in range(6)]
    ways = {
        "SGD": (lambda x: torch.optim.SGD(x, 0.5), {}),
        "LBFGS": (lambda x: torch.optim.LBFGS(x, 0.5, max_iter=2), {"steps": 2}),
        "NewtonCG": (bl.NewtonCG(bl.linear.CG(rtol=1e-13, max_steps=4)), {"steps": 1}),
        "accumulated": (lambda x: torch.optim.SGD(x, 0.5), {"accumulate": 6}),
    }
    found = {}
    for name, (optimizer, settings) in ways.items():
        given = {"batches": batches, "steps": 3, **settings}
        alone = bl.ControlSolver(build, optimizer).solve(start, **given)
        together = bl.ControlSolver(build, optimizer, replicas=replicas).solve(start, **given)
        found[name] = distance(together.control, alone.control), together.costs
    problem, x = build(batches[0])
    own, mine = build(part(batches[0], rank, replicas.size))
    alone = bl.ControlSolver(problem).solve(start, x, steps=2)
    together = bl.ControlSolver(own, replicas=replicas).solve(start, mine, steps=2)
    found["one problem"] = distance(together.control, alone.control), together.costs
    found["its last cost"] = abs(together.cost - alone.cost), together.costs
    return found


def weighted(rank, replicas):
    """Distances of hypergradients in the weights of tasks, which processes share, from one's."""
    own = bl.Replicas(replicas.group, split=False)
    goals, seen = real(50, 5, 3), real(51, 3, 3)

    def of(goal, size):
        return lambda w, batch: size * ((w - goal).cosh().sum() + (w * batch).sum())

    train, judges = ([of(g, 0.1 + i) for i, g in enumerate(each)] for each in (goals, seen))

    def all_train(w, batch):
        return torch.stack([loss(w, batch) for loss in train])

    def all_judged(w, batch):
        return torch.stack([loss(w, batch) for loss in judges])

    vector, matrix = (bl.TaskWeights(5, m, entropy=0.1) for m in (None, 3))
    cases = {
        "tasks": (train, judges, vector, bl.Looped()),
        "columns": (all_train, all_judged, matrix, bl.Vmapped()),
        "columns, one function each": (train, judges, matrix, bl.Looped()),
        "one column": (all_train, [judges[0]], bl.TaskWeights(5, 1), bl.Looped()),
    }
    found = {}
    for name, (losses, judged, weights, evaluate) in cases.items():
        start, alpha = weights.stacked(real(52, 3)), real(53, *weights.shape)
        solver, theirs = (
            bl.BilevelSolver(
                bl.weighted_problem(losses, judged, weights, how),
                bl.optim.SGD(0.02),
                6,
                bl.Implicit(bl.linear.CG(rtol=1e-13)) if name == "columns" else bl.MLM(),
                certificate=None,
                replicas=among,
            )
            for how, among in (
                (evaluate, None),
                (bl.tasks.OverRanks(own, evaluate), own),
            )
        )
        batch = real(54, 3)
        alone = solver.hypergradient(start, alpha, batch, batch)
        together = theirs.hypergradient(start, alpha, batch, batch)
        found[name] = distance(together.gradient, alone.gradient), float(together.value)
    errors = {
        "alone": lambda: replace(theirs, replicas=None).hypergradient(start, alpha, batch, batch),
        "split": lambda: bl.tasks.OverRanks(replicas),
    }
    return found, {name: told(case)[0] for name, case in errors.items()}


def solved(rank, replicas):
    """Distances of bilevel solves; and one that a callback of the last rank ends."""
    found = {}
    solver = solvers()["MLM"][0]
    loaders = bl.Minibatches(TRAIN, 6, seed=3), bl.Minibatches(JUDGED, 6, seed=4)
    for name, batches in {"pairs": [(TRAIN, JUDGED)], "loaders": loaders}.items():
        alone = solver.solve(PARAMS, CONTROL, steps=3, batches=batches)
        together = replace(solver, replicas=replicas).solve(
            PARAMS, CONTROL, steps=3, batches=batches
        )
        found[name] = distance(together.control, alone.control), together.values
    given = {"steps": 2, "batches": [(TRAIN, JUDGED)]}
    alone = solver.solve(PARAMS, CONTROL, **given)
    parts = replace(solver, replicas=replicas, micro_batches=3)
    together = parts.solve(PARAMS, CONTROL, **given)
    found["in parts"] = distance(together.control, alone.control), together.values
    last = rank == replicas.size - 1
    ended = replace(solver, replicas=replicas).solve(
        *(PARAMS, CONTROL),
        steps=5,
        batches=loaders,
        callback=lambda progress: last and progress.step == 2,
    )
    found["ended"] = ended.steps
    return found


def kept(rank, replicas, folder, steps):
    """Goes on with a solve that is kept in a folder, whatever the number of processes before."""
    found = replace(solvers()["MLM"][0], replicas=replicas).solve(
        *(PARAMS, CONTROL),
        steps=steps,
        batches=(bl.Minibatches(TRAIN, 6, seed=3), bl.Minibatches(JUDGED, 6, seed=4)),
        keep=bl.Keep(folder, every=1),
        resume=True,
    )
    return found.control, found.values, sorted(path.name for path in folder.iterdir())


def told(function):
    """What a function raises, in words, and after how many seconds."""
    start = time.monotonic()
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "nothing", 0.0


def refused(rank, replicas):
    """Errors that every rank raises alike, after which the group goes on."""
    solver = replace(solvers()["MLM"][0], replicas=replicas)
    shorter = tuple(x[: 6 + rank] for x in TRAIN)
    sums = bl.BilevelProblem(lambda w, c, b: len(b[0]) * inner(w, c, b), outer)
    other = bl.BilevelProblem(inner, outer if rank else lambda w, c, b: 2 * outer(w, c, b))
    wrong = {**CONTROL, "rate": CONTROL["rate"] + 0.1 * rank}
    infinite = (TRAIN[0], TRAIN[1] * (float("inf") if rank else 1.0))
    split = bl.Replicas(replicas.group, split=True)
    linear = nn.Linear(3, 1).double()
    wrapped = nn.parallel.DistributedDataParallel(linear, process_group=replicas.group)
    cases = {
        "does not divide": lambda: solver.hypergradient(
            PARAMS, CONTROL, tuple(x[:7] for x in TRAIN), JUDGED
        ),
        "parts of other sizes": lambda: solver.hypergradient(PARAMS, CONTROL, shorter, JUDGED),
        "leaves differ": lambda: solver.hypergradient(
            PARAMS, CONTROL, (TRAIN[0], real(1, 4)), JUDGED
        ),
        "other data": lambda: replace(solver, replicas=split).hypergradient(
            PARAMS, CONTROL, (TRAIN[0] + rank, TRAIN[1]), JUDGED
        ),
        "other kinds": lambda: solver.hypergradient(
            PARAMS, CONTROL, TRAIN if rank else {"x": TRAIN[0]}, JUDGED
        ),
        "other control": lambda: solver.hypergradient(PARAMS, wrong, TRAIN, JUDGED),
        "other settings": lambda: replace(solver, inner_steps=5 + rank).hypergradient(
            PARAMS, CONTROL, TRAIN, JUDGED
        ),
        "other steps": lambda: solver.solve(PARAMS, CONTROL, steps=2 + rank),
        "other code": lambda: replace(solver, problem=other).hypergradient(
            PARAMS, CONTROL, TRAIN, JUDGED
        ),
        "a sum": lambda: replace(solver, problem=sums).hypergradient(
            PARAMS, CONTROL, TRAIN, JUDGED
        ),
        "diverges": lambda: solver.hypergradient(PARAMS, CONTROL, infinite, JUDGED),
        "accumulate": lambda: bl.ControlSolver(build, replicas=replicas).solve(
            {"W": real(1, 3, 3), "b": real(2, 3)}, batches=[TRAIN], accumulate=5
        ),
        "wrapped": lambda: bl.BilevelProblem(lambda w, c, b: wrapped(b[0]).sum() * w, outer),
        "Riccati": lambda: bl.ControlSolver(build, bl.Riccati(), replicas=replicas),
        "residual": lambda: bl.BilevelSolver(
            bl.BilevelProblem(outer=outer, residual=lambda w, c, b: w),
            *(bl.optim.FixedPoint(), 5, bl.Implicit()),
            replicas=replicas,
        ),
        "Given": lambda: bl.BilevelSolver(
            NET, bl.Given(lambda w, c, b: w), method=bl.Implicit(), replicas=replicas
        ),
        "hvp": lambda: solver.hvp(PARAMS, CONTROL, CONTROL, TRAIN, JUDGED),
        "kept sweep": lambda: solver.hypergradient(
            PARAMS, CONTROL, TRAIN, JUDGED, keep=bl.Keep(tempfile.mkdtemp())
        ),
        "no group": lambda: bl.Replicas("gloo"),
    }
    return {name: told(case) for name, case in cases.items()}


def broken(rank):
    """Errors of one rank that end the others; each has a group of its own."""

    def objective(failing):
        def inner_of(w, c, batch):
            if rank:
                failing()
            return inner(w, c, batch)

        return bl.BilevelProblem(inner_of, outer)

    def run(failing, timeout=45.0):
        group = bl.Replicas(dist.new_group([0, 1], use_local_synchronization=True), timeout=timeout)
        solver = replace(solvers()["OneStep"][0], problem=objective(failing), replicas=group)
        return told(lambda: solver.hypergradient(PARAMS, CONTROL, TRAIN, JUDGED))

    def raises():
        raise KeyError("mine")

    late = [2.0]  # seconds, of which the first evaluation takes all

    def hangs():
        time.sleep(late.pop() if late else 0)

    return {
        "raises": run(raises),
        "hangs": run(hangs, timeout=1.0),
        "dies": run(lambda: os._exit(3)),
    }


def sharded(rank, replicas):
    """Distances of hypergradients with params in parts, by FSDP2, from whole ones."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    whole, call = bl.functional(net())
    model = net()
    fully_shard(model, mesh=DeviceMesh.from_group(replicas.group, "cpu"))
    parts = {name: p.detach() for name, p in model.named_parameters()}

    def fit(w, c, batch):
        return ((call(w, batch[0])[:, 0] - batch[1]) ** 2).mean()

    def decayed(w, c, batch):
        return fit(w, c, batch) + c["decay"][0].exp() * sum((x**2).sum() for x in w.values())

    problem = bl.BilevelProblem(decayed, fit)
    control = {"decay": CONTROL["decay"][:1], "rate": CONTROL["rate"]}
    found = {}
    rules = {"SGD": RATE, "Adam": bl.optim.Adam(lambda c: c["rate"]), "constant": bl.optim.SGD(0.1)}
    cases = [
        *itertools.product((bl.OneStep(), bl.MLM()), ("SGD", "Adam"), [control]),
        (bl.Penalty(64.0), "constant", {"decay": control["decay"]}),
    ]
    for method, name, control in cases:
        solver = bl.BilevelSolver(problem, rules[name], 3, method, certificate=None)
        alone = solver.hypergradient(whole, control, TRAIN, JUDGED)
        together = replace(solver, replicas=replicas).hypergradient(parts, control, TRAIN, JUDGED)
        kept = {type(x).__name__ for x in together.params.values()}
        params = {n: x.full_tensor() for n, x in together.params.items()}
        found[f"{type(method).__name__}, {name}"] = (
            max(distance(together.gradient, alone.gradient), distance(params, alone.params)),
            kept,
        )
    solution = replace(solver, replicas=replicas).solve(
        parts, control, steps=2, batches=[(TRAIN, JUDGED)]
    )
    solution.load_into(model)
    loaded = model[0].weight.detach().full_tensor()
    found["loaded"] = distance(loaded, solution.params["0.weight"].full_tensor())
    errors = {
        "alone": lambda: solver.hypergradient(parts, control, TRAIN, JUDGED),
        "Implicit": lambda: replace(
            solver, optimizer=bl.optim.SGD(0.1), method=bl.Implicit(), replicas=replicas
        ).hypergradient(parts, control, TRAIN, JUDGED),
        "control": lambda: replace(solver, replicas=replicas).hypergradient(
            whole, {**control, "more": parts["0.weight"]}, TRAIN, JUDGED
        ),
        "functional": lambda: bl.functional(model),
    }
    return found, {name: told(case)[0] for name, case in errors.items()}


def everything(rank, folder):
    """All of it, in one run of three ranks, two of which go on alone; the last one dies of it."""
    found = {"three": hypergradients(rank, bl.Replicas(), ["MLM", "Implicit"])}
    found["kept by three"] = kept(rank, bl.Replicas(), folder, 2)
    pair = dist.new_group([0, 1])
    if rank == 2:
        found["outside"] = told(lambda: bl.Replicas(pair))
        yield found
        return
    two = bl.Replicas(pair)
    found["kept by two"] = kept(rank, two, folder, 4)
    parts = {
        "two": hypergradients,
        "controls": controls,
        "solved": solved,
        "sharded": sharded,
        "weighted": weighted,
    }
    for name, function in {**parts, "refused": refused}.items():
        found[name] = function(rank, two)
    yield found
    found["broken"] = broken(rank)
    yield found
