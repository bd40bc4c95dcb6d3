"""Processes of benchmarks and tests are forked from one that has imported everything."""

from support.preloaded import tell_missing

from carryon.tools.bench.processes import processes


def test_all_modules_are_there_before_the_first_line() -> None:
    """One that cannot be imported is left out without a word, and costs each process seconds."""
    ours, theirs = processes().Pipe()
    process = processes().Process(target=tell_missing, args=(theirs,))
    process.start()
    theirs.close()  # so that a process that ends early ends the wait too
    assert ours.recv() == []
    process.join()
