"""Chats on the command line, and what a newcomer meets there: templates, devices, threads."""

import copy
import io
import os
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import csfast
import tiny
from csfast import doctor, models, ops
from csfast.cli import app, chat
from csfast.engine import lookup

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
PROMPT = ("--prompt", "hi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An instruct model, its plan beside it."""
    folder = tmp_path_factory.mktemp("instruct")
    model, tokenizer = tiny.make_model(), copy.deepcopy(tiny.make_tokenizer())
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    csfast.calibrate(model, ["hello world " * 60], tokenizer, feedback=False).save(
        folder / "a.plan"
    )
    return folder


def call(*arguments, said=None):
    return CliRunner().invoke(app.app, [str(a) for a in arguments], input=said)


def answer(folder, messages, n):
    """What the model answers, dense, by the library."""
    model, tokenizer = models.load(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=n, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


def user(text):
    return {"role": "user", "content": text}


def test_generate_asks_by_the_template(folder):
    done = call("generate", folder, "--dense", "--chat", *PROMPT, "--max-new-tokens", 8)
    assert done.exit_code == 0, done.output
    assert done.stdout == answer(folder, [user("hi")], 8) + "\n"
    given = ("--chat", "--system", "be kind", *PROMPT, "--max-new-tokens", 8)
    done = call("generate", folder, "--dense", *given)
    messages = [{"role": "system", "content": "be kind"}, user("hi")]
    assert done.stdout == answer(folder, messages, 8) + "\n"


def test_a_bare_prompt_of_an_instruct_model_gets_a_hint(folder):
    hint = "this model has a chat template: --chat"
    assert hint in call("generate", folder, "--dense", *PROMPT, "--max-new-tokens", 1).stderr
    done = call("generate", folder, "--dense", "--chat", *PROMPT, "--max-new-tokens", 1)
    assert hint not in done.stderr
    assert hint not in call("generate", "demo", "--dense", *PROMPT, "--max-new-tokens", 1).stderr


def test_a_chat_remembers_what_was_said(folder):
    done = call("chat", folder, "--dense", "--max-new-tokens", 6, said="one\n\n  two \n")
    assert done.exit_code == 0, done.output
    messages = [user("one")]
    first = answer(folder, messages, 6)
    messages += [{"role": "assistant", "content": first}, user("two")]
    assert done.stdout == f"{first}\n{answer(folder, messages, 6)}\n"

    # The same with drafts, of which the engine's own dense answers are the measure.
    model, tokenizer = models.load(folder)
    codes = csfast.sketch(
        model, ["hello world " * 60], tokenizer, out=folder / "a.sketch", bits="2,head=4"
    )
    engine = csfast.Engine(model, codes, tokenizer=tokenizer)
    messages = []
    for text in ("one", "two"):
        messages.append(user(text))
        ids = models.prompt_ids(tokenizer, messages)
        (made,) = engine.generate(ids, max_new_tokens=30, longest=0, lookup=False)
        messages.append({"role": "assistant", "content": made.text})
    given = ("chat", folder, "--sketch", folder / "a.sketch", "--max-new-tokens", 30)
    for more in ((), ("--dense",)):
        done = call(*given, *more, said="one\ntwo\n")
        assert done.exit_code == 0, done.output
        assert done.stdout == f"{messages[1]['content']}\n{messages[3]['content']}\n"
        assert "dense" not in done.stderr and done.stderr.count(" looked up.\n") == 2


def test_a_chat_runs_a_plan_or_says_that_it_runs_none(folder):
    done = call("chat", folder, folder / "a.plan", "--max-new-tokens", 4, said="one\n")
    assert done.exit_code == 0 and "bytes beside the model" in done.stderr
    assert "the model runs dense" not in done.stderr
    done = call("chat", folder, "--max-new-tokens", 4, said="one\n")
    assert done.exit_code == 0 and "no plan, so the model runs dense" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "demo"), "[chat] demo: has no chat template: want an instruct model"),
        (("generate", "demo", "--dense", "--chat", *PROMPT), "[chat] demo: has no chat template"),
        (("generate", "demo", "--dense", "--system", "a", *PROMPT), "--system without --chat"),
        (("chat", "nobody/none"), "`hf download nobody/none` brings one there"),
        (("chat", "{folder}", "{folder}/none.plan"), "none.plan"),
    ],
)
def test_chats_that_cannot_be_are_refused_in_a_line(arguments, message, folder):
    done = call(*(a.format(folder=folder) for a in arguments), said="one\n")
    assert done.exit_code == app.USAGE_ERROR
    assert message in done.stderr.splitlines()[-1] and not done.stdout


def test_a_chat_ends_where_the_context_does(folder):
    done = call("chat", folder, "--dense", "--max-new-tokens", 500, said="one\n")
    assert done.exit_code == 0, done.output  # the answer fills the context of 256
    done = call("chat", folder, "--dense", "--max-new-tokens", 1, said="one\n" + "a" * 300 + "\n")
    assert done.exit_code == app.USAGE_ERROR
    assert "tokens were said, and the model's context is of 256" in done.stderr


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(folder, monkeypatch):
    seen = []

    def stream(model, tokenizer, messages, **_):
        seen.append([m["content"] for m in messages])
        yield "begun"
        if len(seen) == 1:
            raise KeyboardInterrupt
        yield " and ended"

    monkeypatch.setattr(models, "stream_text", stream)
    done = call("chat", folder, "--dense", said="one\ntwo\n")
    assert done.exit_code == 0 and done.stdout == "begun\nbegun and ended\n"
    assert seen == [["one"], ["one", "begun", "two"]]
    seen.clear()
    done = call("generate", folder, "--dense", "--chat", *PROMPT)
    assert done.exit_code == app.INTERRUPTED

    drafts = lookup.Lookup.drafts

    def interrupt(text, longest):
        seen.append(longest)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return drafts(text, longest)

    monkeypatch.setattr(lookup.Lookup, "drafts", interrupt)
    model, tokenizer = models.load(folder)
    made = folder / "b.sketch"
    csfast.sketch(model, ["hello world " * 60], tokenizer, out=made, bits="2,head=4")
    done = call("chat", folder, "--sketch", made, "--max-new-tokens", 40, said="one\ntwo\n")
    assert done.exit_code == 0, done.output
    counts = [int(n) for n in re.findall(r"csfast: (\d+) tokens, the first after", done.stderr)]
    assert len(counts) == 2 and 4 <= counts[0] < counts[1] == 40
    seen.clear()
    done = call("generate", folder, "--sketch", made, "--chat", *PROMPT)
    assert done.exit_code == app.INTERRUPTED


def test_ctrl_d_leaves_a_terminal(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    said = iter(["one", KeyboardInterrupt, " ", " two ", EOFError, "never"])

    def ask(prompt):
        given = next(said)
        if isinstance(given, str):
            return given
        raise given

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", ask)
    assert list(chat._turns()) == ["one", "two"]
    assert "Ctrl-C stops an answer, Ctrl-D leaves" in capsys.readouterr().err


def test_an_empty_answer_says_why(folder, monkeypatch):
    monkeypatch.setattr(models.text, "end_tokens", lambda model: frozenset(range(260)))
    done = call("generate", folder, "--dense", "--chat", *PROMPT)
    assert done.exit_code == 0 and done.stdout == "\n"
    assert "csfast: [generate] no text: the first token, " in done.stderr


PLACED = {
    "calibrate": ("nowhere", "--data", "{data}", "--out", "{folder}/b.plan"),
    "generate": ("nowhere", "--dense", *PROMPT),
    "chat": ("nowhere",),
    "eval": ("nowhere", "{folder}/a.plan", "--data", "{data}"),
    "tokens": ("nowhere", "{folder}/a.plan", "--data", "{data}"),
    "ablate": ("nowhere", "--data", "{data}"),
    "phase": ("nowhere", "--data", "{data}"),
    "bench": ("omp", "--quick"),
}


@pytest.mark.parametrize("command", PLACED)
def test_every_command_says_where_it_runs(command, folder, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    before = torch.get_num_threads()
    names = {"folder": folder, "data": models.demo_folder() / "sample.jsonl"}
    given = [a.format(**names) for a in PLACED[command]]
    try:
        done = call(command, *given, "--device", "cpu", "--threads", 1)
    finally:
        torch.set_num_threads(before)
    line = f"csfast: on cpu ({doctor.cpu_name()}), 1 thread."
    assert done.stderr.splitlines()[0] == line


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch, capsys):
    for ours, torchs in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(ops, "cuda_available", lambda ours=ours: ours)
        monkeypatch.setattr(torch.cuda, "is_available", lambda torchs=torchs: torchs)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Chip 9")
        wanted = "cuda" if ours and torchs else "cpu"
        assert app.place(None, None).type == wanted
        assert f"csfast: on {wanted} (" in capsys.readouterr().err
        assert app.place(app.DeviceName.CPU, None).type == "cpu"


def test_busy_cores_are_told_with_a_remedy(folder, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (2.7, 0.0, 0.0))
    assert doctor.busy(4) == "the cores are busy (load 2.7 of 4): --threads 1 may be faster"
    assert doctor.busy(1) is None
    found = {f.subject: f.text for f in doctor.examine()}
    assert (doctor.busy(torch.get_num_threads()) or "2.7 of the cores") == found["load"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    given = ("--dense", *PROMPT, "--max-new-tokens", 1)
    assert "cores are busy (load 2.7 of 4): --threads 1" in call("generate", folder, *given).stderr
    monkeypatch.setattr(os, "getloadavg", lambda: (9.5, 0.0, 0.0))
    assert "--threads 1 may" in doctor.busy(2)
    for idle in (0.0, 0.4, 1.9):
        monkeypatch.setattr(os, "getloadavg", lambda idle=idle: (idle, 0.0, 0.0))
        assert doctor.busy(4) is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("Tried to\nallocate"), app.USAGE_ERROR),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), app.USAGE_ERROR),
        (ops.BackendError("[x] nothing"), app.USAGE_ERROR),
        (RuntimeError("a mistake of ours"), 1),
    ],
)
def test_too_little_memory_is_a_line_and_our_mistakes_are_not(error, code, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(models, "load", fail)
    done = call("generate", "demo", "--dense", *PROMPT)
    assert done.exit_code == code
    if code == app.USAGE_ERROR:
        assert done.stderr.splitlines()[-1] == "csfast: " + " ".join(str(error).split())
    else:
        assert done.exception is error


@pytest.mark.parametrize(
    ("command", "redirection", "message"),
    [
        ("doctor", ">&- <&-", "[write] stdout is closed"),
        ("doctor", "> /dev/full", "No space left on device"),
        ("--version", "> /dev/full", "No space left on device"),
    ],
)
def test_an_output_that_takes_nothing_is_one_line(command, redirection, message):
    done = subprocess.run(
        f"{sys.executable} -m csfast {command} {redirection}",
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == app.USAGE_ERROR, done.stderr
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr


def test_a_closed_stderr_is_no_place_for_notes(tmp_path):
    out = tmp_path / "omp.json"
    done = subprocess.run(
        f"{sys.executable} -m csfast bench omp --quick --json {out} 2>&-",
        shell=True,
        stdout=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and b"csfast: on" not in out.read_bytes()
