"""``crispedit lenet``: second-order constraints compared where exact curvature can be computed."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import ConfigError
from .options import Json, bars, check_json, write_json_file


def lenet(
    data: Annotated[
        Path | None,
        typer.Option(help="Directory with MNIST and Fashion-MNIST, .npz or idx; else scikit-learn's digits."),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Get both from the Hugging Face hub.")] = False,
    out: Annotated[Path, typer.Option(help="Directory of the pieces; one that was begun is gone on with.")] = Path(
        "out/lenet"
    ),
    constraints: Annotated[
        str | None, typer.Option(help="Names with commas between, or all; without, all that are affordable.")
    ] = None,
    matrix: Annotated[str, typer.Option(help="The matrix that is edited: fc1 or fc2.")] = "fc2",
    activation: Annotated[str, typer.Option(help="relu or tanh.")] = "relu",
    seeds: Annotated[int, typer.Option(help="How many networks.")] = 3,
    energies: Annotated[str, typer.Option(help="How many values of γ, or the values.")] = "20",
    lr: Annotated[float | None, typer.Option(help="Of fine-tuning by SGD.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of fine-tuning.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the trade-off to this .png, .svg or .pdf file.")] = None,
    json: Json = None,
) -> None:
    """Compare second-order constraints on LeNet-5, from MNIST to Fashion-MNIST, by what is learned and what is kept."""
    check_json(json)
    if data is not None and download:
        raise ConfigError("give --data or --download, not both")
    if plot is not None:
        from .plot import check_plot

        check_plot(plot)
    from .experiments.constraints import chosen_constraints
    from .experiments.second_order import LenetJob, Settings

    source = "directory" if data is not None else "download" if download else "digits"
    job = LenetJob(
        out=out,
        settings=Settings.of(source, matrix=matrix, activation=activation, energies=energies, lr=lr, epochs=epochs),
        constraints=chosen_constraints(constraints, dense=source != "digits" and matrix == "fc2"),
        seeds=seeds,
        data=data,
    )
    with bars() as progress:
        found = job.run(progress)
    from .console_second_order import print_second_order
    from .experiments.summary import summarise

    result = summarise(found)
    print_second_order(result)
    if plot is not None:
        from .experiments.picture import draw_second_order

        draw_second_order(result, plot)
    write_json_file(json, result)
