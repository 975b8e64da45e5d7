"""`awareness export`: a memory or a W-Matrix in another form, for whoever it is meant for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awareness_vllm.cli.options import add_what
from awareness_vllm.cli.verify import check

if TYPE_CHECKING:
    from awareness_vllm.models.geometry import Geometry

HELP = "write a memory as the latent of a map, or a memory or a map as a Hugging Face repository"


OF_HUB = ("name", "description", "license", "base_model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_what(parser)
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--latent",
        type=Path,
        metavar="FILE.wmatrix",
        help="as this map's latent, a twentieth of the bytes, which its target alone can load",
    )
    form.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="as the folder of a Hugging Face repository: card, file and signatures",
    )
    latent = parser.add_argument_group("with --latent")
    latent.add_argument(
        "--int8", action="store_true", help="round the latent to int8, which halves it again"
    )
    latent.add_argument(
        "--target",
        metavar="MODEL",
        help="folder of the map's target (default: the one of its name in $AWARENESS_HOME/models)",
    )
    latent.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="store that the latent package goes into (default: that of the package)",
    )
    hub = parser.add_argument_group("with --hf")
    hub.add_argument("--name", help="name on the card (default: the one in the file)")
    hub.add_argument("--description", help="what it is, in one line")
    hub.add_argument("--license", help="SPDX expression, such as CC0-1.0, or the hub's name")
    hub.add_argument(
        "--base-model",
        nargs="+",
        default=[],
        metavar="OWNER/NAME",
        help="the models that it belongs to, by their names on the hub",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.errors import BadInput

    of_the_other = ("int8", "target", "out") if args.hf else OF_HUB
    if given := [name for name in of_the_other if getattr(args, name)]:
        raise BadInput(
            "nothing was exported",
            found=", ".join(f"--{name.replace('_', '-')}" for name in given),
            expected=f"options of --{'hf' if args.hf else 'latent'}",
        )
    return run_hub(args) if args.hf else run_latent(args)


def run_hub(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.marketplace.hub import export_folder

    facts = {"name": args.name, "description": args.description, "license": args.license}
    path = check(args.what, args.store).path
    exported = export_folder(path, args.hf, base_models=args.base_model, **facts)
    return {"folder": str(exported.folder), "files": list(exported.files)}


def run_latent(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from awareness_vllm.align.latent import check_exportable, to_latent
    from awareness_vllm.models.hf import load_model
    from awareness_vllm.packages.file import publish, read
    from awareness_vllm.packages.manifest import id_of
    from awareness_vllm.packages.origin import is_own
    from awareness_vllm.wmatrix.file import load
    from awareness_vllm.wmatrix.registry import locate as locate_wmatrix

    checked = check(args.what, args.store)
    path, digest = checked.path, checked.digest
    package, wmatrix = read(path, digest=digest), load(locate_wmatrix(args.latent))
    check_exportable(package, wmatrix)
    target = target_folder(args.target, wmatrix.manifest.target)
    # As a server computes it, so that both have the same latent.
    model = load_model(target, getattr(torch, wmatrix.manifest.target.dtype))
    embed = model.get_input_embeddings()
    latent = to_latent(
        package,
        wmatrix,
        target,
        lambda ids: embed(ids).float(),
        package_id=id_of(digest),
        int8=args.int8,
    )
    # Whoever may say that the states are those of the text may say so of their latent.
    exported = publish(latent, args.out or path.parent, sealed=is_own(digest))
    return {
        "id": exported.stem,
        "path": str(exported),
        "of": id_of(digest),
        "target": latent.info.target.name,
        "tokens": latent.info.tokens,
        "bytes": exported.stat().st_size,
        "bytes_before": path.stat().st_size,
    }


def target_folder(model: str | None, target: Geometry) -> Path:
    """The folder of a map's target. Raises UnsupportedModel."""
    from awareness_vllm.files import models_dir
    from awareness_vllm.models.folder import is_model_folder, resolve_folder

    by_name = models_dir() / target.name
    if model is None and is_model_folder(by_name):
        return by_name
    return resolve_folder(model or target.name)


def show(result: dict[str, Any]) -> None:
    if "folder" in result:
        print(f"{result['folder']}: {', '.join(result['files'])}")
        return
    share = result["bytes"] / result["bytes_before"]
    print(
        f"{result['id']}  {result['tokens']} tokens for {result['target']}, "
        f"{result['bytes']} bytes ({share:.1%} of {result['of']}), {result['path']}"
    )
