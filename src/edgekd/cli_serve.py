"""Command line: the verbs that talk, over HTTP and in the terminal.

Part of edgekd.cli; the same rules hold.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from edgekd.cli_options import (
    Context,
    Json,
    Model,
    Provider,
    Quiet,
    RequireNpu,
    Revision,
    Threads,
    ask_line,
    need,
    print_result,
)

app = typer.Typer()


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key, else in $EDGEKD_API_KEY.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Name that the server may be called by; repeatable."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose web pages may call the API; repeatable."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate in PEM format, for https; needs --tls-key.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="The certificate's key, in PEM format.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Name of the model in the API.")] = None,
    parallel: Annotated[int, typer.Option(help="Requests that run side by side.")] = 4,
    queue: Annotated[int, typer.Option(help="Requests that may wait; the rest get 429.")] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take, waiting too.")] = 600,
    ctx: Annotated[int, typer.Option(help="Tokens of context of each request.")] = 2048,
    threads: Threads = None,
    gpu_layers: Annotated[
        int | None, typer.Option(help="Layers on the GPU, -1 for all (GGUF).")
    ] = None,
    kv_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_0"],
        typer.Option(help="Type of the KV cache (GGUF)."),
    ] = "f16",
    flash_attention: Annotated[
        bool | None,
        typer.Option(help="Of a GGUF file: faster, rounds to half precision; llama.cpp chooses."),
    ] = None,
    ep: Provider = "cpu",
    require_npu: RequireNpu = False,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve MODEL over the OpenAI API, with a chat page; --json prints where, once ready."""
    need("serve", "fastapi", "uvicorn")
    from edgekd.runtime.batch_engine import EngineOptions
    from edgekd.runtime.engine_worker import WorkerSettings
    from edgekd.runtime.loading import default_threads
    from edgekd.runtime.server import ServeOptions, read_key
    from edgekd.runtime.server import serve as serve_model

    if queue < 0:
        raise typer.BadParameter(f"{queue} is less than none", param_hint="--queue")
    options = ServeOptions(
        alias=alias or Path(model).name,
        host=host,
        port=port,
        api_key=read_key(api_key_file) if api_key_file else os.environ.get("EDGEKD_API_KEY"),
        timeout_s=timeout,
        access_log=not quiet,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        tls_cert=tls_cert,
        tls_key=tls_key,
    )
    engine = EngineOptions(
        context_tokens=ctx,
        n_slots=parallel,
        n_threads=threads or default_threads(),
        gpu_layers=gpu_layers,
        kv_type=kv_type,
        flash_attention=flash_attention,
        provider=ep,
        require_npu=require_npu,
    )
    settings = WorkerSettings(model=model, options=engine, max_waiting=queue, revision=revision)

    def announce(url: str) -> None:
        document = {"url": url, "model": options.alias, "api": f"{url}/v1", "page": f"{url}/"}
        said = f"{options.alias} at {url}/v1, chat page at {url}/; Ctrl-C stops"
        print_result(document, as_json, said)
        sys.stdout.flush()

    serve_model(settings, options, announce)


@app.command()
def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="How the model is to behave.")] = "",
    temperature: Annotated[float, typer.Option(help="0 picks the likeliest token.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens in one reply.")] = 512,
    ctx: Context = 2048,
    threads: Threads = None,
    ep: Provider = "cpu",
    require_npu: RequireNpu = False,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Talk to MODEL; /help lists what can be typed, /exit or end of input leaves.

    With --json the last line of output is the conversation.
    """
    from edgekd.runtime.batch_engine import EngineOptions
    from edgekd.runtime.chat import Terminal
    from edgekd.runtime.chat import chat as chat_with
    from edgekd.runtime.engine_process import EngineProcess
    from edgekd.runtime.engine_worker import WorkerSettings
    from edgekd.runtime.loading import default_threads
    from edgekd.runtime.sampling import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    options = EngineOptions(
        context_tokens=ctx,
        n_threads=threads or default_threads(),
        provider=ep,
        require_npu=require_npu,
    )
    settings = WorkerSettings(model=model, options=options, max_waiting=1, revision=revision)
    spoken = sys.stderr if as_json else sys.stdout

    def say(text: str) -> None:
        if not (as_json and quiet):
            print(text, end="", file=spoken, flush=True)

    def warn(text: str) -> None:
        print(f"[{text}]", file=sys.stderr)

    def note(text: str) -> None:
        if not quiet:
            warn(text)

    terminal = Terminal(lambda prompt: ask_line("" if quiet else prompt, spoken), say, note, warn)
    with EngineProcess(settings) as engine:
        messages = chat_with(engine, params, terminal, system)
    if as_json:
        print(json.dumps({"messages": messages}))
