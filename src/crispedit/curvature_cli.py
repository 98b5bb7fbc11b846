"""``crispedit curvature``: the curvature of a capability loss, computed once."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import ranks
from .errors import TextsError
from .options import (
    Device,
    DeviceMap,
    Dtype,
    FactorKind,
    FisherType,
    Json,
    Layers,
    Model,
    Offload,
    Overwrite,
    Samples,
    Seed,
    Shard,
    Texts,
    TrustRemoteCode,
    bars,
    check_json,
    write_json_file,
)


def curvature(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the curvature.")],
    texts: Texts = None,
    samples: Samples = None,
    layers: Layers = None,
    fisher: FisherType = "mc",
    factors: FactorKind = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    offload: Offload = None,
    shard: Shard = False,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it to this .png, .svg or .pdf file.")] = None,
    energy: Annotated[float, typer.Option(help="γ in [0, 1), marked in the plot and in the table.")] = 0.9,
    json: Json = None,
) -> None:
    """Compute the curvature of a model's capability loss, for any number of later edits."""
    check_json(json)
    from .artifacts import check_writable
    from .checkpoint import load_edited
    from .curvature import Curvature
    from .factors import check_kind
    from .fisher import check_fisher
    from .inputs import capability_texts
    from .models import edit_matrices, find_device, parse_layers
    from .sharding import check_shard, shard_model
    from .threshold import check_energy

    check_writable(out, overwrite=overwrite)
    check_fisher(fisher)
    check_kind(factors)
    check_energy(energy)
    check_shard(shard)
    if plot is not None:
        from .plot import check_plot

        check_plot(plot)
    chosen = parse_layers(layers) if layers is not None else None
    divided = capability_texts(model, texts, samples, seed)
    if divided is None:
        raise TextsError("no capability texts: give --texts FILE (.jsonl, .json or .txt)")
    from . import cache
    from .console_edit import print_curvature

    with bars() as progress:
        where = {"shard": shard, "offload": offload, "edited": partial(edit_matrices, layers=chosen)}
        options = {"device": device, "dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        loaded = load_edited(model, **options, **where)
        if shard:
            shard_model(loaded.model, edit_matrices(loaded.model, chosen), find_device(device))
        found = Curvature.estimate(
            loaded.model,
            loaded.tokenizer,
            divided,
            layers=chosen,
            fisher=fisher,  # type: ignore[arg-type]  # checked above
            factors=factors,  # type: ignore[arg-type]  # checked above
            energy=energy,
            seed=seed,
            model_name=model,
            resume=cache.passes_directory(),
            progress=progress,
        )
    found.save(out, overwrite=overwrite)
    cache.keep(found)
    if not ranks.is_main():
        return  # the main process shows what all have found
    if plot is not None:
        from .plot import draw_curvature

        with ranks.alone():
            draw_curvature(found, energy, plot)
    print_curvature(found)
    from .console import out as stdout

    stdout.print(f"the curvature is in {out}" + (f", its picture in {plot}" if plot else ""), soft_wrap=True)
    write_json_file(json, found.manifest(with_texts=False))
