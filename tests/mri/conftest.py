import pytest


@pytest.fixture(autouse=True, scope="module")
def files_of_our_own():
    """They are read at once: a process for each of hundreds takes longer than all that is read.

    `test_hostile_files` reads files of every kind as users do, which is in a process first.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("applications.trials.POSSIBLE", False)
        yield
