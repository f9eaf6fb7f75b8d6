"""Commands that judge: what sparsity costs, token by token and beside other rules."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..judge import agreement
from ..judge import dictionaries as dictionaries_
from ..judge import phase as phase_
from ..judge import tokens as tokens_
from ..judge.ablate import ablate as ablate_
from ..judge.evaluate import evaluate
from ..plan import Plan
from ..report import page, panels, tables
from ..report import results as results_
from ..sketches import Sketch
from ..types import POOLED
from .app import (
    Bits,
    Block,
    Data,
    Density,
    Html,
    Json,
    Limit,
    Model,
    Overwrite,
    Part,
    PlanFile,
    Resume,
    Retrieval,
    Seed,
    Task,
    Threads,
    Where,
    app,
    check_outputs,
    code,
    headed,
    load,
    n_retrieval,
    place,
    progress,
    read_documents,
    refuse_options,
    resumable,
    write_json,
)

# Options of `eval` that have a meaning for one kind of what it judges.
OF_PLANS = ("density", "bits", "block", "task", "tokens", "retrieval")
OF_SKETCHES = ("levels", "prompts", "new_tokens", "rollouts", "traces", "resume", "overwrite")


@app.command("eval")
def evaluate_(
    context: typer.Context,
    model: Model,
    plan: Annotated[
        pathlib.Path | None, typer.Argument(help="Plan made by csfast calibrate.", metavar="PLAN")
    ] = None,
    sketch: Annotated[
        pathlib.Path | None,
        typer.Option(help="Judge this sketch, a folder, in place of a plan.", metavar="DIR"),
    ] = None,
    data: Data = None,
    density: Density = 0.5,
    bits: Bits = "2",
    block: Block = 1,
    task: Task = POOLED,
    part: Annotated[Part, typer.Option(help="Half of the data to use.")] = Part.REPORT,
    limit: Limit = None,
    tokens: Annotated[int, typer.Option(min=1, help="Scored tokens of every task.")] = 4000,
    retrieval: Retrieval = None,
    levels: Annotated[
        int | None, typer.Option(min=1, help="Levels of the sketch to read; left out, all.")
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="Prompts of every task to judge the sketch on, at most.")
    ] = 35,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that the dense model continues a prompt with.")
    ] = 96,
    rollouts: Annotated[
        int, typer.Option(min=0, help="Prompts of every task to let the sketch draft on, at most.")
    ] = 12,
    traces: Annotated[
        pathlib.Path | None, typer.Option(help="Write every round of drafts here.")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_file: Json = None,
    html_file: Html = None,
    device: Where = None,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Measure what a plan or a sketch costs: loss, divergence and agreement with the dense model.

    A plan is judged along given text; a sketch also along what the dense model itself goes on with,
    and by its drafts.
    """
    if plan is None:
        if sketch is None:
            raise typer.BadParameter("neither PLAN nor --sketch: want one of them.", ctx=context)
        refuse_options(context, OF_PLANS, "it has no meaning for sketches")
        if resume and json_file is None:
            raise ValueError(
                "[eval] --resume without --json: want the file of the run to go on with."
            )
        if traces is not None and rollouts == 0:
            raise ValueError("[eval] --traces with --rollouts 0: want 1 or more.")
        check_outputs(json_file, traces, html_file, inputs=(data, *sketch.glob("*")))
        with resumable("eval", json_file, resume=resume, overwrite=overwrite) as partial:
            samples = read_documents(data, part, limit)
            codes = Sketch.load(sketch)
            most = max(matrix.n_levels for matrix in codes.matrices.values())
            n_levels = most if levels is None else levels
            if n_levels > most:
                raise ValueError(f"[eval] --levels {n_levels} of a sketch of {most}: want no more.")
            # Rounding would blur small differences.
            where = place(device, threads)
            net, tokenizer = load(model, where, dtype="float32")
            read = dict(codes.weights(net, n_levels))
            base = None if n_levels == 1 else dict(codes.weights(net, 1))
            with progress("eval") as advance:
                found, rolled = agreement.judge_weights(
                    net,
                    tokenizer,
                    read,
                    samples,
                    drafting=base,
                    per_task=prompts,
                    new_tokens=new_tokens,
                    rollouts=rollouts,
                    seed=seed,
                    resume=partial,
                    progress=advance,
                )
            results = headed({"bits": codes.bits(n_levels), **found, "levels": n_levels}, where)
            Console().print(tables.agreement(results))
            write_json(json_file, results)
            if html_file is not None:
                page.write_report(html_file, sketch=[results])
            write_json(traces, headed(agreement.traced(results, rolled), where))
        return
    if sketch is not None:
        raise typer.BadParameter("both PLAN and --sketch: want one of them.", ctx=context)
    refuse_options(context, OF_SKETCHES, "it has no meaning for plans")
    check_outputs(json_file, html_file, inputs=(data, plan))
    samples = read_documents(data, part, limit)
    loaded = Plan.load(plan)
    where = place(device, threads)
    net, tokenizer = load(model, where)
    with progress("eval") as advance:
        results = evaluate(
            net,
            tokenizer,
            loaded,
            samples,
            density=density,
            bits=code(bits),
            block=block,
            task=task,
            tokens=tokens,
            retrieval_prompts=n_retrieval(retrieval, data, 40),
            seed=seed,
            progress=advance,
        )
    Console().print(tables.quality(results))
    write_json(json_file, headed(results, where))
    if html_file is not None:
        page.write_report(html_file, evaluation=results)


@app.command()
def ablate(
    model: Model,
    data: Data = None,
    limit: Limit = None,
    tokens: Annotated[int, typer.Option(min=1, help="Scored tokens of every task.")] = 2000,
    retrieval: Retrieval = None,
    methods: Annotated[
        str, typer.Option(help="full, quick, or names with commas between.", metavar="NAMES")
    ] = "full",
    bytes_: Annotated[
        str, typer.Option("--bytes", help="Fractions of the dense bytes.", metavar="FRACTIONS")
    ] = ".25,.35,.55,.75",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_file: Json = None,
    html_file: Html = None,
    device: Where = None,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Compare csfast's selection with other rules and with quantisation, loss against bytes."""
    if resume and json_file is None:
        raise ValueError(
            "[ablate] --resume without --json: want the file of the run to go on with."
        )
    check_outputs(json_file, html_file, inputs=(data,))
    try:
        fractions = [float(part) for part in bytes_.split(",")]
    except ValueError as error:
        raise ValueError(
            f"[ablate] --bytes {bytes_!r}: want fractions with commas between."
        ) from error
    with resumable("ablate", json_file, resume=resume, overwrite=overwrite) as partial:
        select = read_documents(data, Part.SELECT, limit)
        kept = read_documents(data, Part.REPORT, limit)
        # Rounding would blur small differences.
        where = place(device, threads)
        net, tokenizer = load(model, where, dtype="float32")
        with progress("ablate") as advance:
            results = ablate_(
                net,
                tokenizer,
                select,
                kept,
                methods=methods if methods in ("full", "quick") else methods.split(","),
                bytes_fractions=fractions,
                tokens=tokens,
                retrieval_prompts=n_retrieval(retrieval, data, 40),
                seed=seed,
                resume=partial,
                progress=advance,
            )
        table = Table(
            "method", "density", "sensor", "bytes", "loss over dense, nats", "KL", "top-1"
        )
        for row in sorted(results["rows"], key=lambda row: (row["bytes_fraction"], row["delta"])):
            table.add_row(
                row["method"],
                f"{row['density']:.3f}",
                f"{row['sensor_fraction']:.3f}",
                f"{row['bytes_fraction']:.3f}",
                f"{row['delta']:+.4f}",
                f"{row['kl']:.4f}",
                f"{row['top1_agreement']:.3f}",
            )
        Console().print(table)
        write_json(json_file, headed(results, where))
        if html_file is not None:
            page.write_report(html_file, ablation=results)


@app.command()
def tokens(
    model: Model,
    plan: PlanFile,
    data: Data = None,
    density: Density = 0.5,
    bits: Bits = "2",
    task: Task = POOLED,
    generate: Annotated[
        bool, typer.Option("--generate", help="Continue the prompts instead of following the text.")
    ] = False,
    limit_tokens: Annotated[
        int, typer.Option("--tokens", min=3, help="Tokens of one text, at most.")
    ] = 160,
    retrieval: Retrieval = None,
    part: Annotated[Part, typer.Option(help="Half of the data to use.")] = Part.REPORT,
    limit: Limit = None,
    json_file: Json = None,
    html_file: Html = None,
    device: Where = None,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Show what every token of a text cost, one text of every task."""
    check_outputs(json_file, html_file, inputs=(data, plan))
    samples = read_documents(data, part, limit)
    loaded = Plan.load(plan)
    where = place(device, threads)
    net, tokenizer = load(model, where)
    with progress("tokens") as advance:
        found = tokens_.examples(
            net,
            tokenizer,
            loaded,
            samples,
            density=density,
            bits=code(bits),
            task=task,
            generate=generate,
            tokens=limit_tokens,
            retrieval_prompts=n_retrieval(retrieval, data, 4),
            seed=seed,
            progress=advance,
        )
    Console().print(tables.effort(found))
    write_json(json_file, headed(found, where))
    if html_file is not None:
        page.write_report(html_file, effort=found)


@app.command()
def phase(
    model: Model,
    data: Data = None,
    groups: Annotated[int, typer.Option(min=2, help="Groups of neurons a layer.")] = 128,
    steps: Annotated[int, typer.Option(min=2, help="Values of either axis.")] = 12,
    trials: Annotated[int, typer.Option(min=1, help="Signals of a cell.")] = 200,
    limit_tokens: Annotated[
        int, typer.Option("--tokens", min=2, help="Tokens of every task and part to look at.")
    ] = 400,
    retrieval: Retrieval = None,
    limit: Limit = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_file: Json = None,
    dictionaries_file: Annotated[
        pathlib.Path | None,
        typer.Option("--dictionaries", help="Write coherence and isometry of all layers here."),
    ] = None,
    html_file: Html = None,
    device: Where = None,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Measure which sparsity is recovered from how many measurements, and what theory promises."""
    if resume and json_file is None:
        raise ValueError("[phase] --resume without --json: want the file of the run to go on with.")
    check_outputs(json_file, dictionaries_file, html_file, inputs=(data,))
    with resumable("phase", json_file, resume=resume, overwrite=overwrite) as partial:
        select = read_documents(data, Part.SELECT, limit)
        kept = read_documents(data, Part.REPORT, limit)
        where = place(device, threads)
        net, tokenizer = load(model, where, dtype="float32")
        with progress("capture") as advance:
            fit, shown = phase_.capture(
                net,
                tokenizer,
                select,
                kept,
                tokens=limit_tokens,
                retrieval_prompts=n_retrieval(retrieval, data, 20),
                seed=seed,
                progress=advance,
            )
        with progress("phase") as advance:
            found = phase_.diagrams(
                fit,
                shown,
                n_groups=groups,
                steps=steps,
                trials=trials,
                resume=partial,
                progress=advance,
            )
        with progress("dictionaries") as advance:
            known = dictionaries_.analyse(fit, n_groups=groups, progress=advance)
        for sentence in (*panels.phase_findings(found), *panels.dictionary_findings(known)):
            Console().print(sentence)
        write_json(json_file, headed(found, where))
        write_json(dictionaries_file, headed(known, where))
        if html_file is not None:
            page.write_report(html_file, phase=found, dictionaries=known)


@app.command("report")
def report_(
    out: Annotated[pathlib.Path, typer.Argument(help="Page to write.", metavar="OUT.html")],
    ablation: Annotated[pathlib.Path | None, typer.Option(help="Of csfast ablate.")] = None,
    evaluation: Annotated[pathlib.Path | None, typer.Option(help="Of csfast eval.")] = None,
    phase_file: Annotated[
        pathlib.Path | None, typer.Option("--phase", help="Of csfast phase.")
    ] = None,
    dictionaries_file: Annotated[
        pathlib.Path | None, typer.Option("--dictionaries", help="Of csfast phase.")
    ] = None,
    effort_file: Annotated[
        pathlib.Path | None, typer.Option("--effort", help="Of csfast tokens.")
    ] = None,
    size_curve: Annotated[pathlib.Path | None, typer.Option(help="Rows of a size curve.")] = None,
    storage: Annotated[pathlib.Path | None, typer.Option(help="Rows of a storage study.")] = None,
    demo_file: Annotated[
        pathlib.Path | None, typer.Option("--demo", help="Of csfast demo.")
    ] = None,
    sketch_files: Annotated[
        list[pathlib.Path] | None,
        typer.Option("--sketch", help="Of csfast eval --sketch; may be given several times."),
    ] = None,
) -> None:
    """Write one page of results from files of them."""
    files = {
        "ablation": ablation,
        "evaluation": evaluation,
        "phase": phase_file,
        "dictionaries": dictionaries_file,
        "effort": effort_file,
        "size_curve": size_curve,
        "storage": storage,
        "demo": demo_file,
    }
    check_outputs(out, inputs=(*files.values(), *(sketch_files or ())))
    given = {kind: results_.read(path, kind) for kind, path in files.items() if path is not None}
    if sketch_files:
        given["sketch"] = [one for path in sketch_files for one in results_.read(path, "sketch")]
    page.write_report(out, **given)
    Console().print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")
