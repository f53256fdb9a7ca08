"""The house, read from its source: rooms, what stands above what, and how long things are."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import bilevel

ROOT = Path(__file__).parent.parent
# The rooms of the library and of the applications, and the files of each, in the order of reading:
# a file imports only from what stands above it. The files beside the rooms of the library are the
# ground that they stand on, and their roof.
ROOMS = {
    "bilevel": ["errors", "shards", "tree", "records", "checks", "settings", "drawing"],
    "bilevel.autodiff": [
        *("junctions", "series", "graphs", "second", "gradients"),
        *("linearisation", "nested", "reversible"),
    ],
    "bilevel.dynamics": [
        "dynamics",
        "closures",
        "per_step",
        "steps",
        "problem",
        "compiled",
        "modules",
    ],
    "bilevel.linear": [
        *("operator", "flat", "system", "cg", "normal_cg", "gmres", "neumann", "direct"),
        *("singular", "steihaug"),
    ],
    "bilevel.sweeps": [
        *("storage", "host", "disk", "schedule", "checkpointing", "randomness"),
        *("block", "determinism", "trajectory", "memory"),
    ],
    "bilevel.outer": [
        *("watching", "generators", "batches", "leaves", "encoding", "checkpoints", "signals"),
        *("keep", "keeping", "running", "descent"),
    ],
    "bilevel.parallel": ["wire", "agreement", "parts", "replicas", "portions", "objectives"],
    "bilevel.implicit_function": ["question", "systems", "equations", "function"],
    "bilevel.control.riccati": [
        *("layout", "controls", "mapping", "constraints", "settings", "stages", "blocks"),
        *("linearisation", "box", "sweep", "bounds", "newton", "solving"),
    ],
    "bilevel.control": [
        *("lagrangian", "kept_sweep", "adjoint", "many", "tangent", "rollout", "newton_cg"),
        *("solution", "second_order", "conditions", "sensitivity", "factors", "optimum", "solver"),
    ],
    "bilevel.prox": ["operators", "sets", "groups"],
    "bilevel.optim": [
        *("rules", "descent", "proximal", "adaptive", "around", "torch_rules", "roots", "given"),
    ],
    "bilevel.inner": ["problem", "residuals", "iteration", "batches"],
    "bilevel.methods": [
        *("instance", "base", "pairing", "unrolled", "mlm", "implicit", "one_step", "penalty"),
        *("first_order",),
    ],
    "bilevel.certificates": [
        *("certificate", "against_steps", "curvature", "matrix", "correction", "judgement"),
        *("orders", "against_minimiser"),
    ],
    "bilevel.tasks": ["normalisers", "weights", "problem", "over_ranks", "adaptation", "stacked"],
    "bilevel, between its rooms": ["solution"],
    "bilevel.updates": ["accumulated", "hessian", "asking", "tasks", "kept_solution", "history"],
    "bilevel, above its rooms": ["solver"],
    "bilevel.testing": ["vectors", "maps", "gradients", "hypergradients"],
    "applications": [
        "errors",
        "inputs",
        "trials",
        "files",
        "outputs",
        "keeping",
        "records",
        "settings",
        "pictures",
        "options",
        "command_line",
        "processes",
    ],
    "applications.mri.bundled": ["paths"],
    "applications.mri.physics": [
        "masks",
        "operators",
        "measured",
        "coil_counts",
        "loops",
        "products",
        "consistency",
        "filter_matrices",
        "filter_loops",
        "wavelets",
        "l1_spirit",
    ],
    "applications.mri.formats": [
        "base",
        "hdf5",
        "cfl",
        "fastmri_header",
        "fastmri",
        "m4raw",
        "encoding",
        "lines",
        "noise",
        "acquired",
        "ismrmrd_header",
        "ismrmrd",
        "twix",
        "nifti",
    ],
    "applications.mri.data": [
        *("centre", "values", "volumes", "remarks", "slices", "writing", "coil_fits", "images"),
    ],
    "applications.mri.sampling": [
        "base",
        "cartesian",
        "darts",
        "scattered",
        "gaussian",
        "from_file",
        "named",
    ],
    "applications.mri.simulation": [
        *("anatomy", "coils", "local_phase", "simulate", "views", "phantoms"),
    ],
    "applications.mri.network": [
        "architecture",
        "layers",
        "modules",
        "wavelet_phases",
        "scan",
        "certificate",
        "reconstruction",
        "tensor_files",
        "weights",
        "held_out",
        "checked",
        "exported",
    ],
    "applications.mri.training": [
        "precision",
        "schedules",
        "examples",
        "draws",
        "self_supervised",
        "adaptation",
        "validation",
        "settings",
        "training",
        "keeping",
    ],
    "applications.mri.tasks": ["task_list", "tasks", "task_facts"],
    "applications.mri.evaluation": [
        "metrics",
        "baselines",
        "bart",
        "methods",
        "scoring",
        "verdicts",
        "scan_slices",
        "scanning",
        "figures",
        "kept",
    ],
    "applications.mri.meta": [
        "settings",
        "losses",
        "agreeing_descent",
        "solvers",
        "learning",
        "results",
        "experiment",
        "transfer_results",
        "transfer",
        "figures",
    ],
    "applications.mri.commands": [
        *("shared", "demo_figure", "demo", "reports", "scans", "train", "meta", "app"),
    ],
    "applications.mri": ["__main__"],
    "applications.toy": [
        "idx",
        "data",
        "models",
        "tasks",
        "task_results",
        "task_weights",
        "cleaning",
        "hyper_cleaning",
        "figures",
        "cli",
        "__main__",
    ],
}
LAYERS = [f"{room.split(',')[0]}.{name}" for room, names in ROOMS.items() for name in names]
# What the front door does not have is found in these.
PACKAGES = [
    *("certificates", "control", "dynamics", "errors", "inner", "linear", "methods", "optim"),
    *("outer", "parallel", "prox", "settings", "solution", "solver", "sweeps", "tasks", "testing"),
]
MOST_FILES = 15  # in a folder, its __init__.py among them
LONGEST = 60  # lines of a function, docstring apart


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(p): p
    for package in ("bilevel", "applications")
    for p in sorted((ROOT / package).rglob("*.py"))
}
FACES = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
LIBRARY = [name for name in SOURCES if name.startswith("bilevel.") and name not in FACES]
APPLICATIONS = {name: path for name, path in SOURCES.items() if name.startswith("applications")}
FILES = {name: path for name, path in SOURCES.items() if name not in FACES}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(parsed(path)))


@cache
def imported(path: Path) -> tuple[tuple[str, list[str]], ...]:
    """(module, names) of every absolute import of a file."""
    return tuple(pair for node in nodes(path) for pair in imports(node))


def imports(node: ast.AST) -> list[tuple[str, list[str]]]:
    """(module, names) of what a node imports absolutely; no names for `import module`."""
    if isinstance(node, ast.Import):
        return [(alias.name, []) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "", [alias.name for alias in node.names])]
    return []


LATER = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.If


def late_imports(node: ast.AST, late: bool = False) -> list[ast.AST]:
    """What is imported within functions, classes and conditions."""
    found = []
    for child in ast.iter_child_nodes(node):
        # `__getattr__` of a room names the extra that its programs need.
        within = isinstance(child, LATER) and getattr(child, "name", "") != "__getattr__"
        if late and isinstance(child, ast.Import | ast.ImportFrom):
            found.append(child)
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            found += late_imports(child, late or within)
    return found


def lines_of_docstring(node: ast.FunctionDef) -> int:
    return len((ast.get_docstring(node, clean=False) or "").splitlines())


@cache
def own_imports(path: Path) -> set[str]:
    """Files of ours that a file imports; the face of a room stands for every file in it."""
    found = set()
    for module, names in imported(path):
        if module.split(".")[0] in ("bilevel", "applications"):
            for name in names or [""]:
                joined = f"{module}.{name}".rstrip(".")
                found.add(joined if joined in SOURCES else module)
    for room in found & FACES - {"bilevel"}:
        found |= {f"{room}.{name}" for name in ROOMS[room]}
    return found - FACES


def test_the_list_holds_every_file_and_no_other():
    assert sorted(FILES) == sorted(LAYERS)


def test_a_file_imports_only_from_files_above_it():
    place = {name: i for i, name in enumerate(LAYERS)}
    wrong = {
        (name, other)
        for name, path in FILES.items()
        for other in own_imports(path)
        if place.get(other, len(LAYERS)) >= place[name]
    }
    assert wrong == set()


def test_a_room_hands_on_what_stands_in_it_and_says_what_it_is_for():
    for room in sorted(FACES - {"bilevel"}):
        body = parsed(SOURCES[room]).body
        assert isinstance(body[0], ast.Expr), room  # the docstring
        # `__getattr__` hands on what needs an extra, when it is asked for.
        handed = [node for node in body[1:] if getattr(node, "name", "") != "__getattr__"]
        assert {type(node) for node in handed} <= {ast.ImportFrom, ast.Assign, ast.AugAssign}, room
        others = own_imports(SOURCES[room])
        assert [name for name in others if not name.startswith(f"{room}.")] == [], room


def test_no_folder_is_longer_than_its_list_of_names_can_be_read_at_once():
    folders = {path.parent for path in SOURCES.values()}
    assert {f.name: n for f in folders if (n := len([*f.glob("*.py")])) > MOST_FILES} == {}


def test_a_function_fits_on_a_screen():
    lengths = {
        (name, node.name): node.end_lineno - node.lineno + 1 - lines_of_docstring(node)
        for name, path in FILES.items()
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef)
    }
    assert {f: n for f, n in lengths.items() if n > LONGEST} == {}


def test_our_own_files_are_imported_at_the_top_and_absolutely():
    late = [
        (name, module)
        for name, path in SOURCES.items()
        for node in late_imports(parsed(path))
        for module, _ in imports(node)
        if module.split(".")[0] in ("bilevel", "applications")
    ]
    relative = [
        (name, node.lineno)
        for name, path in SOURCES.items()
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert late == []
    assert relative == []


def test_the_library_never_imports_an_application():
    found = [
        (name, module)
        for name in LIBRARY
        for module, _ in imported(SOURCES[name])
        if module.startswith("applications")
    ]
    assert found == []


def test_applications_use_public_names_only():
    """What they import of the library is a name that it, or one of its packages, hands on."""
    public = {
        f"bilevel.{name}".removesuffix("."): vars(
            importlib.import_module(f"bilevel.{name}".rstrip("."))
        )
        for name in ["", *PACKAGES]
    }
    for file, path in APPLICATIONS.items():
        for module, names in imported(path):
            if module.split(".")[0] == "bilevel":
                assert module in public, f"{module} is private, in {file}"
                assert {*names} <= {*public[module].get("__all__", public[module])}, file
        chains = [dotted(node) for node in nodes(path) if isinstance(node, ast.Attribute)]
        for chain in chains:
            if chain.startswith("bl."):
                name, *rest = chain.split(".")[1:]
                said = f"{chain} is private, in {file}"
                assert name in bilevel.__all__ or name in {*PACKAGES, "__version__"}, said
                if name in PACKAGES and rest:
                    of = public[f"bilevel.{name}"]
                    assert rest[0] in of.get("__all__", of), said


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def differentiating(path: Path) -> set[str]:
    """What in the code of a file (not in its texts) differentiates."""
    found = set()
    for node in nodes(path):
        name = dotted(node)
        if name.startswith(("torch.autograd.", "torch.func.")):
            found.add(name)
        if isinstance(node, ast.Call) and name.endswith(".backward"):
            found.add(name)
        if isinstance(node, ast.Call) and dotted(node.func).endswith((".backward", ".vmap")):
            found.add(dotted(node.func))
    for module, names in imported(path):
        for full in [module, *(f"{module}.{n}" for n in names)]:
            if full.startswith(("torch.autograd", "torch.func", "functorch", "torch.vmap")):
                found.add(full)
    return found


ALLOWED = {
    "bilevel.dynamics.modules": {"torch.func.functional_call"},
    "bilevel.tasks.problem": {"torch.func.vmap"},
    "bilevel.tasks.stacked": {"torch.func.vmap"},
    "bilevel.implicit_function.question": {"torch.vmap"},
    "bilevel.implicit_function.function": {
        *("torch.autograd.Function", "torch.autograd.forward_ad"),
        *(
            "torch.autograd.forward_ad._set_fwd_grad_enabled",
            "torch.autograd.forward_ad.unpack_dual",
        ),
    },
    "bilevel.control.riccati.mapping": {"torch.func.vmap"},
}


def test_only_autodiff_differentiates():
    found = {
        name: differentiating(SOURCES[name]) - ALLOWED.get(name, set())
        for name in LIBRARY
        if not name.startswith("bilevel.autodiff.")
    }
    assert {name: names for name, names in found.items() if names} == {}


def test_the_search_for_differentiation_finds_that_of_autodiff():
    assert "torch.autograd.grad" in differentiating(SOURCES["bilevel.autodiff.junctions"])


def test_the_front_door_only_hands_on_and_lists_all_of_it_in_order():
    body = parsed(SOURCES["bilevel"]).body
    assert isinstance(body[0], ast.Expr)  # the docstring
    assert {type(node) for node in body[1:]} <= {ast.ImportFrom, ast.Assign, ast.AugAssign}
    handed_on = {
        alias.name
        for node in body
        if isinstance(node, ast.ImportFrom) and node.module != "bilevel"
        for alias in node.names
    }
    assert sorted(handed_on) == sorted(bilevel.__all__)
    assert len(bilevel.__all__) <= 50
    # Constants, then classes, then functions, each in order: what ruff calls sorted.
    kinds_of = [(not n.isupper(), n[0].islower(), n) for n in bilevel.__all__]
    assert kinds_of == sorted(kinds_of)


HEAVY = [
    *("applications", "h5py", "ismrmrd", "matplotlib", "nibabel", "rich", "scipy", "sigpy"),
    *("skimage", "sklearn", "typer", "yaml"),
]


def test_importing_the_library_loads_nothing_heavy():
    code = f"import sys, bilevel; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert found.stdout.strip() == "[]"
