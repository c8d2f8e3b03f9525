"""The sandbox against real escapes, and pass@k against its definition."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import psutil
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_merge.errors import EvaluationError
from hf_merge.evaluation import code
from hf_merge.evaluation.code import SLOT, Limits, PassAtK, completion_of, run_program
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is of Linux's kernel")

SHORT = Limits(seconds=2.0)


def test_a_program_that_comes_to_its_end_passes() -> None:
    outcome = run_program("import math\nassert math.sqrt(4) == 2\nprint('here')", SHORT)
    assert outcome.passed
    assert outcome.output == "here\n"


@pytest.mark.parametrize(
    "source",
    [
        "assert 1 == 2",
        "raise ValueError",
        "import sys\nsys.exit(0)\nassert False",
        "import os\nos._exit(0)\nassert False",
        "def f(:",
        "import os\nos.abort()",
        "import ctypes\nctypes.string_at(0)",
    ],
)
def test_a_program_that_does_not_come_to_its_end_fails(source: str) -> None:
    assert not run_program(source, SHORT).passed


def test_an_infinite_loop_is_stopped() -> None:
    start = time.monotonic()
    outcome = run_program("while True: pass", Limits(seconds=1.0))
    assert (outcome.passed, outcome.why) == (False, "was stopped after 1 s")
    assert time.monotonic() - start < 10


def test_a_program_that_only_sleeps_is_stopped() -> None:
    assert run_program("import time; time.sleep(60)", Limits(seconds=0.5)).why == "was stopped after 0.5 s"


def test_ten_gigabytes_are_not_to_be_had() -> None:
    outcome = run_program("x = bytearray(10 * 2**30)", SHORT)
    assert not outcome.passed
    assert "MemoryError" in outcome.output


def test_memory_within_the_limit_is_to_be_had() -> None:
    assert run_program("x = bytearray(2**28)", SHORT).passed


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize(
    "connect",
    [
        "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
    ],
)
def test_there_is_no_network(listener: socket.socket, connect: str) -> None:
    source = connect.format(port=listener.getsockname()[1])
    outcome = run_program(source, SHORT)
    assert not outcome.passed
    assert "stopped" not in outcome.why
    listener.settimeout(0.05)
    with pytest.raises(TimeoutError):
        listener.accept()


def test_the_program_of_the_socket_test_connects_outside_the_sandbox(listener: socket.socket) -> None:
    source = f"import socket; socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), timeout=1)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.fork()",
        "import subprocess\nsubprocess.Popen(['sleep', '60'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import multiprocessing\nmultiprocessing.get_context('spawn').Process(target=print).start()",
        "import os\nos.setsid()",
        "import os, signal\nos.kill(os.getppid(), 0)",
        "import os, signal\nos.kill(-1, 0)",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
        "import os\nos.unshare(0x10000000)" if hasattr(os, "unshare") else "import os\nos.setpgid(0, 0)",
    ],
)
def test_other_processes_can_neither_be_made_nor_touched(source: str) -> None:
    outcome = run_program(source, SHORT)
    assert not outcome.passed
    assert "Error" in outcome.output


def test_a_fork_bomb_leaves_nothing_behind() -> None:
    before = {process.pid for process in psutil.process_iter()}
    source = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert not run_program(source, Limits(seconds=1.0)).passed
    after = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and "sandbox.py" in str(p.info["cmdline"])]
    assert [p for p in after if p.ppid() in (1, os.getpid())] == []


def test_what_the_program_prints_is_bounded() -> None:
    outcome = run_program("while True: print('x' * 2**20)", Limits(seconds=20.0, file=2**22))
    assert not outcome.passed
    assert "stopped" not in outcome.why
    assert len(outcome.output) <= 2000


def test_the_program_sees_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run_program("import os\nassert 'HF_TOKEN' not in os.environ, os.environ", SHORT).passed


def test_a_folder_of_its_own_is_deleted() -> None:
    outcome = run_program("import os\nopen('a', 'w').write('b')\nprint(os.getcwd())", SHORT)
    assert outcome.passed
    assert not Path(outcome.output.strip()).exists()


@pytest.mark.parametrize(
    "source",
    [
        "open({path!r}).read()",
        "open({path!r}, 'a')",
        "import os; os.remove({path!r})",
        "import os; os.truncate({path!r}, 0)",
        "import os; open(f'/proc/{{os.getppid()}}/environ').read()",
    ],
)
def test_files_elsewhere_are_closed(tmp_path: Path, source: str) -> None:
    secret = tmp_path / "token"
    secret.write_text("secret")
    outcome = run_program(source.format(path=str(secret)), SHORT)
    if not outcome.files_closed:
        pytest.skip("this kernel has no Landlock")
    assert "PermissionError" in outcome.output
    assert secret.read_text() == "secret"


@pytest.mark.parametrize(
    "source",
    [
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import numpy\nassert numpy.ones(3) @ numpy.ones(3) == 3",
        "import asyncio\nasyncio.run(asyncio.sleep(0.01))",
        "import tempfile\ntempfile.TemporaryFile()",
        "import resource\nassert resource.getrlimit(resource.RLIMIT_AS)[0] == 2**30",
        "import random, datetime\nrandom.seed()\ndatetime.datetime.now()",
        "if __name__ == '__main__':\n    x = [y for y in '√']\nassert x",
    ],
)
def test_ordinary_python_works(source: str) -> None:
    outcome = run_program(source, Limits(seconds=20.0))
    assert outcome.passed, outcome.output


def test_sets_come_in_the_same_order_in_every_run() -> None:
    source = "print(list({str(i) for i in range(50)}))"
    assert run_program(source, SHORT).output == run_program(source, SHORT).output


@pytest.mark.parametrize("field", ["seconds", "memory", "file"])
def test_limits_are_positive(field: str) -> None:
    with pytest.raises(EvaluationError, match=f"'{field}' is a positive number, got 0"):
        Limits(**{field: 0})


def test_a_machine_without_a_sandbox_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sandbox.py").write_text("raise OSError('no filter of system calls is known')")
    monkeypatch.setattr(code, "_SANDBOX", tmp_path / "sandbox.py")
    with pytest.raises(EvaluationError, match=r"(?s)none was run: .*OSError: no filter") as caught:
        run_program(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists(), caught


# pass@k

REFERENCE = f"{SLOT}\nassert f(2) == 4"
RIGHT, WRONG = "def f(x):\n    return 2 * x", "def f(x):\n    return x"


def test_nothing_runs_unless_it_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="allow_code_execution=True"):
        PassAtK().compute(predictions=[[RIGHT]], references=[REFERENCE])


def test_pass_at_1_is_the_share_of_problems_whose_program_passes() -> None:
    found = PassAtK().compute(predictions=[[RIGHT], [WRONG]], references=[REFERENCE] * 2, allow_code_execution=True)
    assert found == {"pass_at_k": 0.5}


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (4, 0, 2), (4, 4, 4), (6, 1, 5)])
def test_pass_at_k_is_the_share_of_choices_of_k_with_one_that_passes(n: int, c: int, k: int) -> None:
    completions = [RIGHT] * c + [WRONG] * (n - c)
    chosen = [any(i < c for i in some) for some in combinations(range(n), k)]
    found = PassAtK().compute(predictions=[completions], references=[REFERENCE], k=k, allow_code_execution=True)
    assert found is not None
    assert found["pass_at_k"] == pytest.approx(sum(chosen) / len(chosen))


def test_fewer_completions_than_k_are_refused() -> None:
    with pytest.raises(EvaluationError, match="pass@2 needs at least 2"):
        PassAtK().compute(predictions=[[RIGHT]], references=[REFERENCE], k=2, allow_code_execution=True)


@pytest.mark.parametrize(
    "bad", ["while True: pass", "x = bytearray(10 * 2**30)", "import socket; socket.socket()"], ids=["loop", "memory", "socket"]
)
def test_a_hostile_completion_counts_as_a_failure(bad: str) -> None:
    predictions, references = [[f"{bad}\n{RIGHT}"], [RIGHT]], [REFERENCE, REFERENCE]
    found = PassAtK().compute(predictions=predictions, references=references, seconds=2, allow_code_execution=True)
    assert found == {"pass_at_k": 0.5}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("    return x\n\ndef other():", "    return x\n"),
        ("Sure!\n```python\ndef f(x):\n    return x\n```\nDone.", "def f(x):\n    return x"),
        ("```\nx = 1", "x = 1"),
        ("    return x", "    return x"),
    ],
)
def test_a_completion_is_the_code_of_an_answer(text: str, wanted: str) -> None:
    assert completion_of(text) == wanted


# the objective

CHAIN = {"return": "x", "x": "[EOS]", "loop": "while", "while": "True:", "True:": "pass", "pass": "[EOS]"}
VOCABULARY = ["[PAD]", "[UNK]", "[EOS]", "def", "f(x):", "return", "x", "loop", "while", "True:", "pass", "0", "1", "#"]


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def writer() -> LlamaForCausalLM:
    """A model whose next word is that of `CHAIN` after the last one."""
    size = len(VOCABULARY)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=32, eos_token_id=2, **sizes))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 16))
        model.lm_head.weight.zero_()
        for word, following in CHAIN.items():
            model.lm_head.weight[VOCABULARY.index(following), VOCABULARY.index(word)] = 10.0
    return model


def problems(**columns: list[object]) -> DatasetDict:
    rows = {"text": ["def f(x): return", "x loop return", "# loop"], "label": ["assert f(2) == 2", "assert True", ""]}
    data = Dataset.from_dict({**rows, **columns})
    return DatasetDict({"search": data, "held_out": data.map(lambda row: {"text": "x " + row["text"]})})


def objective(**settings: object) -> Objective:
    given = {"name": "code", "dataset": problems(), "task": "code-generation", "allow_code_execution": True}
    arguments = {"metric_arguments": {"seconds": 2}, "max_new_tokens": 4}
    return Objective(**{**given, **arguments, **settings})  # type: ignore[arg-type]


def test_an_objective_of_code_needs_leave_to_run_it() -> None:
    with pytest.raises(EvaluationError, match="set allow_code_execution=True"):
        objective(allow_code_execution=False)


def test_a_model_s_programs_are_run_against_their_tests(writer: LlamaForCausalLM, words: PreTrainedTokenizerFast) -> None:
    evaluator = Evaluator([objective()], config=writer.config, tokenizer=words)
    score = evaluator.measure(writer, replicates=50)["code"]
    # "def f(x): return x" passes its test; "x loop return x" is no Python; "# loop while True: pass" is a comment.
    assert score.outcomes is not None
    assert score.outcomes.tolist() == [1.0, 0.0, 1.0]
    assert score.value == pytest.approx(2 / 3)
    assert score.interval is not None


def test_a_program_is_made_of_the_columns_that_its_template_names(
    writer: LlamaForCausalLM, words: PreTrainedTokenizerFast
) -> None:
    data = problems(tests=[["assert f(2) == 2", "assert f(3) == 3"], ["assert f(2) == 3"], ["assert f(0) == 0"]])
    template = "def f(x): return{completion}\n{tests}"
    chosen = objective(dataset=data, input="text", task_arguments={"program": template})
    found = Evaluator([chosen], config=writer.config, tokenizer=words).measure(writer)["code"].outcomes
    assert found is not None
    assert found.tolist() == [1.0, 0.0, 0.0]


def test_a_template_of_unknown_columns_is_refused(writer: LlamaForCausalLM, words: PreTrainedTokenizerFast) -> None:
    chosen = objective(task_arguments={"program": "{completion}{labl}"})
    with pytest.raises(EvaluationError, match=r"in the program 'labl'\. Did you mean 'label'"):
        Evaluator([chosen], config=writer.config, tokenizer=words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_arguments": {"sample": 2}}, "Unknown task argument of code-generation 'sample'"),
        ({"task_arguments": {"samples": 0}}, "`samples` is a whole number, at least the 1"),
        ({"task_arguments": {"temperature": 0}}, "`temperature` is a positive number"),
        ({"metric_arguments": {"k": 3}, "task_arguments": {"samples": 2}}, "at least the 3 of pass@k"),
        ({"metric_arguments": {"k": 0}}, "`k` of pass@k is a positive whole number"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    writer: LlamaForCausalLM, words: PreTrainedTokenizerFast, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        Evaluator([objective(**settings)], config=writer.config, tokenizer=words)


def test_several_completions_are_drawn_and_the_same_ones_again(
    writer: LlamaForCausalLM, words: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        writer.lm_head.weight.mul_(0.02)
    chosen = objective(task_arguments={"samples": 6, "temperature": 2.0}, metric_arguments={"k": 2, "seconds": 2})
    runner = Evaluator([chosen], config=writer.config, tokenizer=words)._prepared[0].parts["search"].runner
    state = torch.get_rng_state()
    first = runner(writer)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert runner(writer) == first
    assert [len(each) for each in first] == [6, 6, 6]
    assert len({text for each in first for text in each}) > 6


def test_the_space_before_a_continuation_is_kept(writer: LlamaForCausalLM, words: PreTrainedTokenizerFast) -> None:
    runner = Evaluator([objective()], config=writer.config, tokenizer=words)._prepared[0].parts["search"].runner
    assert runner(writer)[0] == [" x"]


def test_how_answers_are_drawn_is_part_of_the_fingerprint(writer: LlamaForCausalLM, words: PreTrainedTokenizerFast) -> None:
    chosen = [objective(), objective(task_arguments={"samples": 2}), objective(task_arguments={"stops": ["x"]})]
    assert len({Evaluator([each], config=writer.config, tokenizer=words).fingerprint for each in chosen}) == 3
