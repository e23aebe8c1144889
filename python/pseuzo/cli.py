"""The command line: `pseuzo`, or `python -m pseuzo`."""

from pathlib import Path

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pseuzo")
def main() -> None:
    """Fine-tune language models by forward passes alone, in the memory of inference."""


@main.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="pseuzo-demo", show_default=True,
              help="Folder for summary.json, metrics.jsonl, curves.png and model/.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True,
              help="Steps of each method; a step is two forward passes.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the batches and of the perturbations.")
@click.option("--method", "methods", multiple=True, metavar="NAME",
              help="Only this method; may be given several times. Default: all four.")  # fmt: skip
@click.option("--device", default=None, help="cpu or cuda. Default: cuda where there is one.")
def demo(out: Path, steps: int, batch_size: int, seed: int, methods: tuple[str, ...], device: str | None) -> None:
    """Fine-tune an embedded OPT of a million parameters in about a minute.

    The question put to it: is this line of the Python standard library code or docstring prose? MeZO, PseuZO with rows
    paired as published and by label, and MeZO with noise on a tenth of the weights start from the same pretrained model
    and see the same batches. Prints what each reached.
    """
    import torch  # here, so that --help is quick

    from pseuzo.demo import run as demo_run

    known = [m.name for m in demo_run.METHODS]
    for name in methods:
        if name not in known:
            raise click.UsageError(f"unknown method {name!r}; known: {', '.join(known)}")
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if out.exists() and not out.is_dir():
        raise click.UsageError(f"{out} is a file, not a folder")
    summary = demo_run.run(out, list(methods) or known, steps, batch_size, seed, where)
    _print_demo(summary, out)


class Failure(click.ClickException):
    """One sentence and exit code 2."""

    exit_code = 2


@main.command()
@click.option("--base", required=True, help="The model the run began with: a folder, or a name on the hub.")
@click.option("--journal", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="What the run wrote (pseuzo.Journal).")  # fmt: skip
@click.option("--output", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Folder for the model; must be empty or not there.")  # fmt: skip
@click.option("--until", type=click.IntRange(min=0), help="Stop before this step. Default: the whole journal.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute; the bits are the same anywhere.")
def replay(base: str, journal: Path, output: Path, until: int | None, device: str) -> None:
    """Rebuild fine-tuned weights from the base model and the journal of the run, bit for bit."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    from pseuzo.files import save_model
    from pseuzo.journal import JournalError, read_journal
    from pseuzo.journal import replay as replay_journal

    if output.exists() and any(output.iterdir()):
        raise Failure(f"{output} is not empty; choose another folder")
    try:
        header, records = read_journal(journal)
        total = sum(1 for _ in records)
        dtype = getattr(torch, header["params"][0]["dtype"])
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device)
        steps = total if until is None else min(total, max(until - header["first_step"], 0))
        with tqdm(total=steps, desc="replay", unit="step") as bar:
            step = replay_journal(journal, model, until=until, progress=lambda record: bar.update())
    except JournalError as error:
        raise Failure(str(error)) from None
    except (OSError, RuntimeError) as error:
        raise Failure(f"{base} cannot be loaded: {str(error).splitlines()[0]}") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, Path(base), output)
    click.echo(f"{steps} steps replayed, up to step {step}; the model is in {output}")


@main.command()
def info() -> None:
    """Print versions, what each op runs on and why, the GPU, and a short self-test of the kernels."""
    import platform

    import torch
    import transformers

    import pseuzo_kernels as pk
    from pseuzo_kernels import reference

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    click.echo(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    built = pk._C.build_info() if pk._C else {}
    cpp = (
        f"C++ ({pk._C.cpu_isa()}, of {', '.join(built['isas'])})"
        if pk._C
        else "plain torch (the extension is not built)"
    )
    click.echo(f"noise and window on CPU tensors: {cpp}")
    click.echo(f"noise on CUDA tensors: {f'triton {triton_version}' if triton_version else 'plain torch (no triton)'}")
    window = f"CUDA {built['cuda']}" if built.get("cuda") else "plain torch (built without nvcc)"
    click.echo(f"window on CUDA tensors: {window}")
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    click.echo(f"GPU: {', '.join(gpus) or 'none'}")
    failed = False
    for device in ["cpu", *(["cuda"] if gpus else [])]:
        for noise in ("hadamard", "rademacher"):
            x = torch.linspace(-1, 1, 50_000).to(torch.bfloat16)
            got = x.to(device)
            for api, y in ((pk, got), (reference, x)):
                api.update_(y, [1, 2, 3], [0.1, -0.2, 0.3], lr=0.1, noise=noise, rounding="stochastic")
            same = torch.equal(got.cpu(), x)
            failed |= not same
            click.echo(f"self-test, {noise} on {device}: {'same bits as the reference' if same else 'DIFFERS'}")
    if failed:
        raise Failure("the kernels disagree with the reference on this machine; please report it")


def _print_demo(summary: dict, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{summary['steps']} steps of 2 forward passes, batch {summary['batch_size']}, {summary['hardware']}"
    )
    for column in ("method", "test before", "test after", "steps/s", "peak memory"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for figures in summary["methods"].values():
        table.add_row(
            figures["title"], f"{figures['test_accuracy_before']:.3f}", f"{figures['test_accuracy_after']:.3f}",
            f"{figures['steps_per_s']:.1f}", f"{figures['peak_memory_mib']:.0f} MiB",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"Best on the validation lines: {summary['saved_model']}, saved in {out}/model. "
        f"Curves: {out}/curves.png. Figures: {out}/summary.json, {out}/metrics.jsonl",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
