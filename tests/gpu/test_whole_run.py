"""The command from its start to the export on one GPU, killed in between. Each start is a new process."""

import multiprocessing

from tests.helpers.killable import run_command_here
from tests.helpers.whole_run import check_whole_run


def in_new_process(arguments, log, die):
    process = multiprocessing.get_context("spawn").Process(
        target=run_command_here, args=("train", arguments, str(log), 0, 1, "", die)
    )
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def test_a_killed_run_with_an_fp8_teacher_resumes_exports_and_evaluates(tmp_path, on_cuda):
    environment = check_whole_run(tmp_path, in_new_process)
    assert environment["device"].startswith("cuda") and environment["attention"] == "Transformer Engine"
