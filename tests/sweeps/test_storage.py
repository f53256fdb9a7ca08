"""Where snapshots are kept, and that nothing is left behind."""

import errno
import gc

import pytest
import torch
from problems import CASES, Custom, real
from reference import assert_same, fresh, plain_gradients

import bilevel as bl
from bilevel.errors import ArgumentError, StorageError
from bilevel.sweeps import disk as storage

C, U = 0.5 * real(1, 3), real(2, 3)
STORAGES = [bl.InMemory, bl.OnHost, bl.OnDisk]


def tanh(u, c, t):
    return torch.tanh(c * u + t)


def problem_of(step=tanh, horizon=9):
    return bl.ControlProblem(Custom(step), lambda u, c: (u**2).sum(), horizon)


def on_disk(folder, snapshots=3):
    return bl.Checkpointing(snapshots, storage=bl.OnDisk(folder))


STATE = {
    "x": real(1, 3, 2).T,
    "z": torch.complex(real(2, 4), real(3, 4)).conj(),
    "imaginary": torch.complex(real(2, 4), real(3, 4)).conj().imag,
    "half": real(4, 5).to(torch.bfloat16),
    "count": torch.arange(6)[::2],
    "on": torch.tensor([True, False]),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
    "k": 7,
    "none": None,
}


@pytest.mark.parametrize("kind", STORAGES)
def test_states_come_back_to_the_last_bit_whatever_their_kind(kind, tmp_path):
    place = (kind(tmp_path) if kind is bl.OnDisk else kind()).open()
    place.put(0, STATE)
    place.put(3, {**STATE, "x": STATE["x"] + 1})
    assert_same(place.get(3)["x"], STATE["x"] + 1, rtol=0)
    for _ in range(2):
        found = place.get(0)
        assert found.keys() == STATE.keys()
        for name, value in STATE.items():
            if isinstance(value, torch.Tensor):
                assert found[name].dtype == value.dtype
                assert torch.equal(found[name], value), name
            else:
                assert found[name] == value
    place.drop(3)
    place.drop(0)
    place.close()
    place.close()


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_sweep_on_disk_leaves_no_file(case, tmp_path):
    found = bl.adjoint(
        case.problem, case.observation, case.control, checkpointing=on_disk(tmp_path)
    )
    _, gradient, _ = plain_gradients(case.problem, case.observation, case.control)
    assert_same(found.gradient, gradient)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_on_disk_has_a_file_for_each_snapshot_while_it_runs(tmp_path):
    seen = []

    def step(u, c, t):
        seen.append(len(list(tmp_path.glob("*/*"))))
        return tanh(u, c, t)

    bl.adjoint(problem_of(step), U, C, checkpointing=on_disk(tmp_path))
    assert max(seen) == 3
    assert seen[0] == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [1, 5, 9, 10, 15])
def test_a_sweep_that_ends_early_leaves_no_file(call, error, tmp_path):
    calls = []

    def step(u, c, t):
        calls.append(t)
        if len(calls) == call:
            assert len(list(tmp_path.glob("*/*"))) >= 1
            raise error("now")
        return tanh(u, c, t)

    with pytest.raises(error, match="now"):
        bl.adjoint(problem_of(step), U, C, checkpointing=on_disk(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["backward", "backward twice", "never", "error"])
def test_a_rollout_on_disk_leaves_no_file(end, tmp_path):
    control, failing = fresh(C), []

    def step(u, c, t):
        if failing:
            raise RuntimeError("now")
        return tanh(u, c, t)

    final = bl.rollout(bl.Map(step), U, control, 9, checkpointing=on_disk(tmp_path))
    assert len(list(tmp_path.glob("*/*"))) >= 1
    if end == "error":
        failing.append(True)
        with pytest.raises(RuntimeError, match="now"):
            final.sum().backward()
    elif end == "never":
        del final
        gc.collect()
    else:
        final.sum().backward(retain_graph=True)
        if end == "backward twice":
            final.sum().backward()
    assert list(tmp_path.iterdir()) == []


def fill_up(monkeypatch, after):
    """The disk takes `after` files, and half of the next."""
    plain, written = storage.write, []

    def write(path, tensors):
        written.append(path)
        plain(path, tensors)
        if len(written) > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write", write)
    return written


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_full_disk_is_an_error_that_names_the_path_and_leaves_nothing(
    after, tmp_path, monkeypatch
):
    written = fill_up(monkeypatch, after)
    with pytest.raises(StorageError, match=r"No space left on device.*free space") as caught:
        bl.adjoint(problem_of(), U, C, checkpointing=on_disk(tmp_path))
    assert str(written[-1]) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_in_a_backward_leaves_nothing(tmp_path, monkeypatch):
    final = bl.rollout(bl.Map(tanh), U, fresh(C), 9, checkpointing=on_disk(tmp_path))
    fill_up(monkeypatch, 0)
    with pytest.raises(StorageError, match="No space left on device"):
        final.sum().backward()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_somebody_shortened_is_an_error(tmp_path):
    place = bl.OnDisk(tmp_path).open()
    place.put(0, {"x": U})
    (path,) = tmp_path.glob("*/*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=rf"could not be read from {path}.*too short"):
        place.get(0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"folder of OnDisk must exist, got .*missing"):
        bl.adjoint(problem_of(), U, C, checkpointing=on_disk(tmp_path / "missing"))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(storage.tempfile, "mkdtemp", refuse)
    with pytest.raises(StorageError, match=f"could be made in {tmp_path}: Permission denied"):
        bl.adjoint(problem_of(), U, C, checkpointing=on_disk(tmp_path))


@pytest.mark.cuda
def test_snapshots_on_the_host_leave_the_gpu_and_come_back():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    control, observation = C.cuda(), real(2, 3, 10**5).transpose(0, 1).contiguous().cuda()
    problem = problem_of(horizon=12)
    truth = bl.adjoint(problem, observation, control, checkpointing=bl.Checkpointing(block=None))
    for snapshots in (None, 3):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        chosen = bl.Checkpointing(snapshots, storage=bl.OnHost())
        found = bl.adjoint(problem, observation, control, checkpointing=chosen)
        assert_same(found.gradient, truth.gradient)
        assert torch.cuda.max_memory_allocated() - before < 10 * observation.nbytes
