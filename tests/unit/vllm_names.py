"""The names of vLLM that this project uses, looked up in vLLM's sources: nothing is imported, so a
version for another device, or one that is not installed, can be checked as well.

    python tests/unit/vllm_names.py FOLDER

FOLDER holds the package `vllm`, such as an unpacked wheel.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONNECTOR = "awareness_vllm.serving.connector.connector.AwarenessConnector"
BASES = tuple(
    f"vllm.distributed.kv_transfer.kv_connector.v1.base.{name}"
    for name in ("KVConnectorBase_V1", "SupportsHMA")
)
OWN = ("failing",)
"""Methods of our connector that vLLM does not call."""
FOLDERS = ("awareness_vllm", "demo", "benchmarks", "examples")
IMPORT = re.compile(r"\b(import|from)\b.*\bvllm\b")
"""In every file that imports vLLM, and few others: those need not be parsed."""
USED = {
    "vllm.config.VllmConfig": (
        "cache_config compilation_config device_config kv_transfer_config model_config "
        "parallel_config speculative_config"
    ),
    "vllm.config.ParallelConfig": (
        "data_parallel_size decode_context_parallel_size pipeline_parallel_size "
        "prefill_context_parallel_size tensor_parallel_size"
    ),
    "vllm.config.CacheConfig": "block_size cache_dtype kv_cache_dtype_skip_layers",
    "vllm.engine.arg_utils.EngineArgs": (
        "data_parallel_size decode_context_parallel_size kv_cache_dtype kv_cache_dtype_skip_layers "
        "pipeline_parallel_size prefill_context_parallel_size"
    ),
    "vllm.engine.protocol.EngineClient": "collective_rpc errored generate renderer vllm_config",
    "vllm.entrypoints.anthropic.serving.AnthropicServingMessages": (
        "_get_disabled_thinking_effort|disabled_thinking_effort_resolver _merge_inline_system "
        "to_chat_completion_request"
    ),
    "vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat": "render_chat_request",
    "vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion": (
        "render_completion_request"
    ),
    "vllm.entrypoints.openai.models.serving.OpenAIServingModels": (
        "engine_client is_base_model lora_requests"
    ),
    "vllm.entrypoints.openai.responses.serving.OpenAIServingResponses": (
        "enable_store online_renderer response_store use_harmony"
    ),
    "vllm.entrypoints.cli.serve.ServeSubcommand": "cmd subparser_init validate",
    "vllm.renderers.online_renderer.OnlineRenderer": "render_responses",
    "vllm.v1.core.sched.output.SchedulerOutput": (
        "num_scheduled_tokens scheduled_cached_reqs scheduled_new_reqs total_num_scheduled_tokens"
    ),
    "vllm.v1.core.sched.output.NewRequestData": (
        "block_ids num_computed_tokens prompt_token_ids req_id sampling_params"
    ),
    "vllm.v1.core.sched.output.CachedRequestData": (
        "new_block_ids num_computed_tokens req_ids resumed_req_ids"
    ),
    "vllm.v1.kv_cache_interface.KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm.v1.kv_cache_interface.SlidingWindowSpec": "sliding_window",
    "vllm.v1.kv_cache_interface.UniformTypeKVCacheSpecs": "block_size first_spec kv_cache_specs",
    "vllm.v1.outputs.KVConnectorOutput": "failed_recving finished_recving kv_connector_worker_meta",
    "vllm.v1.request.Request": (
        "cache_salt kv_transfer_params num_tokens prompt_token_ids request_id"
    ),
}
"""Attributes that are used of vLLM's classes, where no import shows it; `|` stands between those of
which one must be there."""


class Sources:
    """A folder with the package `vllm`, module by module as it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, dict[str, ast.AST]] = {}

    def path(self, module: str) -> Path | None:
        """The file of a module or package, None where there is none."""
        base = self.folder.joinpath(*module.split("."))
        candidates = (base.with_suffix(".py"), base / "__init__.py")
        return next((path for path in candidates if path.is_file()), None)

    def defined(self, module: str) -> dict[str, ast.AST]:
        """What a module defines or imports at its top level, by name."""
        if module not in self.names:
            path = self.path(module)
            tree = ast.parse(path.read_text()) if path else ast.Module([], [])
            self.names[module] = names = dict(_definitions(tree.body))
            star = names.pop("*", None)
            for node in tree.body if star else ():
                if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                    names.update(self.defined(self.absolute(module, node)))
        return self.names[module]

    def has(self, module: str, name: str) -> bool:
        """Whether `from module import name` finds something."""
        if self.path(f"{module}.{name}") or name in self.defined(module):
            return True
        # Names that a module hands on when they are asked for, as `vllm` itself does.
        lazy = self.defined(module).get("__getattr__")
        path = self.path(module)
        return lazy is not None and path is not None and f'"{name}"' in path.read_text()

    def class_of(self, name: str) -> tuple[str, ast.ClassDef] | None:
        """The module and definition of a class, through the modules that hand it on."""
        module, _, wanted = name.rpartition(".")
        for _ in range(8):
            node = self.defined(module).get(wanted)
            if isinstance(node, ast.ClassDef):
                return module, node
            if not isinstance(node, ast.ImportFrom):
                return None
            alias = next(one for one in node.names if wanted in (one.asname, one.name))
            module, wanted = self.absolute(module, node), alias.name
        return None

    def absolute(self, module: str, node: ast.ImportFrom) -> str:
        """The module that an import in another one names."""
        if not node.level:
            return node.module or ""
        path = self.path(module)
        package = (
            module if path is not None and path.name == "__init__.py" else module.rpartition(".")[0]
        )
        parents = package.split(".")
        kept = parents[: len(parents) - node.level + 1]
        return ".".join([*kept, *filter(None, [node.module])])

    def attributes(self, name: str) -> set[str] | None:
        """A class's attributes and those of its bases in vLLM; None for no such class."""
        if (found := self.class_of(name)) is None:
            return None
        module, node = found
        names = {one for one, _ in _definitions(node.body)}
        for part in ast.walk(node):  # what methods set on self
            if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                names.add(part.attr)
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                names |= self.attributes(f"{module}.{base.id}") or set()
        return names

    def parameters(self, name: str, method: str) -> list[str] | None:
        """The parameters of a method by position, `self` first; None where there is none."""
        if (found := self.class_of(name)) is None:
            return None
        node = dict(_definitions(found[1].body)).get(method)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
        bases = [f"{found[0]}.{base.id}" for base in found[1].bases if isinstance(base, ast.Name)]
        return next((p for base in bases if (p := self.parameters(base, method))), None)


def _definitions(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """What some statements bind, those within `if`, `try` and `with` among them."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (one for target in targets for one in ast.walk(target)):
                if isinstance(name, ast.Name):
                    yield name.id, node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody"):
                yield from _definitions(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _definitions(handler.body)


def imported(folders: Sequence[str] = FOLDERS) -> Iterator[tuple[Path, str, str]]:
    """The file, module and name ("" for the module itself) of each import of vLLM."""
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if IMPORT.search(text) else ():
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "vllm":
                        yield path, alias.name, ""
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    yield path, node.module or "", alias.name


def missing(sources: Sources, used: Mapping[str, str] = USED) -> list[str]:
    """What this project uses and these sources lack."""
    complaints = [
        f"{path.relative_to(ROOT)}: {module} {name}".rstrip()
        for path, module, name in imported()
        if not (sources.has(module, name) if name else sources.path(module))
    ]
    for name, attributes in used.items():
        if (found := sources.attributes(name)) is None:
            complaints.append(f"no class {name}")
        else:
            complaints += [
                f"{name}.{either}"
                for either in attributes.split()
                if found.isdisjoint(either.split("|"))
            ]
    return complaints


def contract(sources: Sources) -> list[str]:
    """The methods of our connector that vLLM's contract does not have, or calls otherwise."""
    ours = Sources(ROOT)
    found = ours.class_of(CONNECTOR)
    assert found is not None
    complaints = []
    for node in found[1].body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.name in OWN:
            continue
        theirs = [p for base in BASES if (p := sources.parameters(base, node.name)) is not None]
        if not theirs:
            complaints.append(f"vLLM's connectors have no {node.name}")
        elif (mine := ours.parameters(CONNECTOR, node.name)) not in theirs:
            complaints.append(f"{node.name} is called with {theirs[0]}, not {mine}")
    return complaints


def main() -> int:
    sources = Sources(Path(sys.argv[1]))
    if sources.path("vllm") is None:
        print(f"{sources.folder} has no package vllm")
        return 2
    complaints = [*missing(sources), *contract(sources)]
    print("\n".join(complaints) or f"all {len(list(imported()))} imports are there")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
