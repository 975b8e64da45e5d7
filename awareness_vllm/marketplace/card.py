"""The card of a memory or a W-Matrix: the README.md of its repository on the Hugging Face hub.

Names, licences and descriptions are anybody's text: what could make a link, an image, a heading or
HTML of them in Markdown is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from awareness_vllm.errors import escaped
from awareness_vllm.marketplace.licenses import HUB
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.trust.policy import Role, signature_path
from awareness_vllm.wmatrix.certificate import Certificate, Control, Interval, Plan
from awareness_vllm.wmatrix.listing import Listing, WMatrixListing

LIBRARY = "awareness-vllm"
MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+.!|~&:@=$^]|^-)")
"""What could begin any of Markdown's forms within a line; "-" does so only at its beginning."""


def card(
    listing: Listing,
    file: str,
    signatures: Mapping[Role, str],
    *,
    base_models: Sequence[str] = (),
) -> str:
    """The README.md of a repository, nothing of the memory's text in it.

    Args:
        file: the name of the file that is listed.
        signatures: the fingerprints of the keys whose signatures lie beside it.
        base_models: the source and the target by their names on the hub.
    """
    parts = [front_matter(listing, base_models), f"# {plain(listing.name)}"]
    if listing.description:
        parts.append(plain(listing.description))
    if isinstance(listing, PackageListing):
        parts += _memory(listing, file, signatures)
    else:
        parts += _map(listing, file, signatures)
    return "\n\n".join(parts) + "\n"


def front_matter(listing: Listing, base_models: Sequence[str]) -> str:
    """The card's metadata, in YAML."""
    from huggingface_hub import ModelCardData

    kind = "memory-package" if isinstance(listing, PackageListing) else "w-matrix"
    license, name = listing.license, None
    if license is not None:
        # The hub does not tell "this version only" from "or any later".
        known = re.sub(r"-(only|or-later)$", "", license.casefold())
        license, name = (known, None) if known in HUB else ("other", license)
    data = ModelCardData(
        license=license,
        license_name=name,
        library_name=LIBRARY,
        base_model=list(base_models) or None,
        tags=[LIBRARY, kind, "kv-cache"],
    )
    return f"---\n{data.to_yaml()}\n---"


def plain(text: str) -> str:
    """Any text as one line of Markdown that shows just this text."""
    return MARKUP.sub(r"\\\1", escaped(text).strip())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _memory(listing: PackageListing, file: str, signatures: Mapping[Role, str]) -> list[str]:
    manifest = listing.manifest
    source, tokens = plain(listing.source_model), f"{manifest.tokens:,} tokens"
    latent = manifest.latent
    facts = [("ID", f"`{listing.id}`"), *_file(listing, file), ("tokens", f"{manifest.tokens:,}")]
    facts += _model("source model", manifest.geometry)
    facts.append(("computed by", manifest.engine))
    if latent is None:
        form = f"the KV cache that {source} computed for a text of {tokens}"
        loads = "a vLLM server of another model loads it through a W-Matrix, one of the same model"
        loads += " as an exact copy"
    else:
        form = f"a text of {tokens} as {source} has read it, in the latent of one W-Matrix"
        loads = f"a vLLM server of {plain(latent.target.name)} that has this W-Matrix loads it"
        facts += [*_model("for", latent.target), ("latent of", f"`{latent.package}`")]
        facts += [("W-Matrix, tensors' sha256", f"`{latent.wmatrix}`"), ("dtype", latent.dtype)]
    if manifest.edition_of:
        facts.append(("edition of", f"`{manifest.edition_of}`"))
    holds = "The file holds the text too: whoever has the file can read it."
    if not manifest.has_text:
        holds = "The file holds neither text nor token ids, which does not hide the text: prompts "
        holds += "can be rebuilt from KV states."
    question = f'awareness ask {listing.id} "A question about the text?" --target MODEL'
    verify = f"awareness verify {listing.id} --trust trust.json"
    return [
        f"A *memory package* of {LIBRARY}: {form}. So {loads}, and answers questions about the "
        f"text without reading it. {holds}",
        table(("", ""), facts),
        "## Load it",
        _pull(verify, question),
        "## Whom you trust",
        "The ID is the first half of the file's sha256: with the ID you have exactly these bytes. "
        "What they say is the word of whoever made them, "
        f"{_signed(file, 'package', signatures)}.",
    ]


def _map(listing: WMatrixListing, file: str, signatures: Mapping[Role, str]) -> list[str]:
    manifest = listing.manifest
    source, target = plain(listing.source_model), plain(listing.target_model)
    facts = [*_file(listing, file), *_model("source", manifest.source)]
    facts += _model("target", manifest.target)
    facts += [
        ("source layers read", f"{len(manifest.layers)} of {len(manifest.source.layers)}"),
        ("rank of the latent", f"{manifest.rank:,}"),
        ("reads", "tokens and states" if manifest.reads_tokens else "states alone"),
        ("anchors", f"{manifest.anchors.tokens:,} tokens of {manifest.anchors.documents:,} texts"),
    ]
    if manifest.quantization:
        facts.append(("stored in", manifest.quantization))
    pulled = f"$AWARENESS_HOME/wmatrices/{file}"
    return [
        f"A *W-Matrix* of {LIBRARY}: the learned linear map from the KV cache of {source} to that "
        f"of {target}. With it a vLLM server of {target} loads memories that {source} computed. It "
        "serves exactly these weights and tokenizers, by their fingerprints.",
        table(("", ""), facts),
        *_certificate(listing.certificate, file, signatures),
        "## Load it",
        _pull(
            f"awareness verify {pulled} --trust trust.json",
            f"awareness serve MODEL --wmatrix {pulled}",
        ),
        "## Whom you trust",
        f"The map is the word of whoever made it, {_signed(file, 'wmatrix', signatures)}.",
    ]


def _certificate(
    certificate: Certificate | None, file: str, signatures: Mapping[Role, str]
) -> list[str]:
    heading = "## Certificate"
    if certificate is None:
        return [
            heading,
            "None: nothing of what this map keeps was measured, and nothing is claimed.",
        ]
    counts, protocol = certificate.counts, certificate.protocol
    rows = [_plan(plan) for plan in certificate.plans]
    parts = [
        heading,
        f"**Measured** on {certificate.measured}, "
        f"{plain(certificate.hardware) or 'hardware unknown'}: "
        f"{counts['texts']:,} texts of {protocol.context:,} tokens"
        + (f", {counts['cases']:,} facts" if counts.get("cases") else "")
        + (f"; tier {certificate.tier}" if certificate.tier else "")
        + ". Retention is 1 where the memory helps as much as the text itself, and 0 where it helps"
        " no more than nothing; in brackets 95 % intervals over texts. A control is what the same "
        "operations buy without a memory, and the margin what the memory keeps above the best one.",
        table(("tokens", "read natively", "cost", "retention", "best control", "margin"), rows),
    ]
    if facts := [_facts(plan) for plan in certificate.plans if plan.facts]:
        head = ("tokens", "read natively", "memory", "best control", "margin", "quoted*", "margin*")
        parts += [
            "Facts recalled, as a share of those recalled natively (* with the passages that are "
            "re-read quoted before the question instead, as a server does by default):",
            table(head, facts),
        ]
    return [
        *parts,
        "**Claimed** is the margin alone where its interval is above zero (bold), on such texts. "
        "The figures are the word of who measured them, "
        f"{_signed(file, 'certificate', signatures)}.",
    ]


def _plan(plan: Plan) -> tuple[str, ...]:
    return (
        *(f"{plan.context:,}", native(plan), f"{plan.cost:.0%}", interval(plan.retention)),
        *(_best(plan.controls), _margin(plan.margin)),
    )


def _facts(plan: Plan) -> tuple[str, ...]:
    assert plan.facts is not None
    return (
        *(f"{plan.context:,}", native(plan), interval(plan.facts)),
        *(_best(plan.facts_controls), _margin(plan.facts_margin)),
        interval(plan.facts_quoted) if plan.facts_quoted else "",
        _margin(plan.facts_quoted_margin) if plan.facts_quoted else "",
    )


def _best(controls: Mapping[Control, Interval]) -> str:
    if not controls:
        return "not measured"
    name = max(controls, key=lambda name: controls[name].mean)
    return f"{controls[name].mean:.3f} ({name})"


def _margin(margin: Interval | None) -> str:
    if margin is None:
        return "none"
    text = interval(margin)
    return f"**{text}**" if margin.ci_low > 0 else text


def interval(figure: Interval) -> str:
    """A figure and its interval."""
    ends = f"{figure.ci_low:.3f} … {figure.ci_high:.3f}"
    return f"{figure.mean:.3f} ({ends})"


def native(plan: Plan) -> str:
    """What of a memory a plan reads natively."""
    parts = [f"the last {plan.tail}"] if plan.tail else []
    parts += [f"up to {plan.reread} re-read"] if plan.reread else []
    return ", ".join(parts) or "nothing"


def _file(listing: Listing, file: str) -> list[tuple[str, str]]:
    about = [("file", plain(file)), ("sha256", f"`{listing.digest}`")]
    return [*about, ("bytes", f"{listing.bytes:,}")]


def _model(role: str, model: Geometry) -> list[tuple[str, str]]:
    shapes = {(layer.heads, layer.head_dim) for layer in model.layers}
    heads = " or ".join(f"{heads} × {dim}" for heads, dim in sorted(shapes))
    cache = f"{len(model.layers)} layers, KV heads × dims {heads}, {plain(model.dtype)}"
    return [
        (role, f"{plain(model.name)}: {cache}"),
        (f"{role}: weights, tokenizer", f"{plain(model.weights)} {plain(model.tokenizer)}"),
    ]


def _signed(file: str, role: Role, signatures: Mapping[Role, str]) -> str:
    if (fingerprint := signatures.get(role)) is None:
        return "which nobody has signed: until you know better, it is a claim"
    name = signature_path(Path(file), role).name
    return f"signed in `{name}` with the key `{fingerprint}`: a claim until you trust that key"


def _pull(*use: str) -> str:
    pull = (
        "hf download OWNER/NAME",
        "awareness pull ~/.cache/huggingface/hub/models--OWNER--NAME",
    )
    return "\n".join(("```sh", *pull, *use, "```"))
