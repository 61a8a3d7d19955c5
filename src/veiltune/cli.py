"""The command line: parse, call, print. Data goes to stdout, everything for people to stderr.

Nothing heavy is imported before a verb is known, so that ``--help`` is instant.

Exit codes: 0; 1 to 7 and 70 by whose fault it was (see `veiltune.errors`); 130 after Ctrl-C; 141 when the reader of
stdout went away.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veiltune.arguments import CONFIG_HELP, VERBS, build_parser, parse_settings
from veiltune.errors import ConfigError, ExactnessError, UserError, VeiltuneError, nearest, storage_fault

if TYPE_CHECKING:
    from veiltune.config import Config
    from veiltune.session import Outcome

INTERRUPTED = 130
READER_GONE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    for name, value in {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(name, value)
    logging.getLogger("veiltune").addHandler(
        logging.NullHandler()
    )  # a session's log is in OUT/log; people have the display
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # other libraries', which tell a user nothing
            return _run(arguments, is_program=argv is None)
    except VeiltuneError as error:
        _say_error(error)
        if as_json:
            print(json.dumps({"error": error.message, "hint": error.hint}), flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped at once; a checkpoint that was committed is whole", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout at exit; give it one that takes everything.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except OSError as error:
        fault = storage_fault(error, "this machine's")
        if fault is None:
            raise
        _say_error(fault)
        return fault.exit_code


def _run(arguments: list[str], *, is_program: bool) -> int:
    parser = build_parser(
        {
            "demo": _demo,
            "tune": _tune,
            "generate": _generate,
            "verify": _verify,
            "inspect": _inspect,
            "protect": _protect,
            "attack": _attack,
            "compare": _compare,
            "advise": _advise,
            "party": _party,
            "keygen": _keygen,
            "attest": _attest,
            "seal": _seal,
        }
    )
    verb = next((each for each in arguments if not each.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        raise UserError(f"there is no verb {verb!r}", hint=nearest(verb, VERBS))
    options = parser.parse_args(arguments)
    options.is_program = is_program
    return options.run(options)


def _say_error(error: VeiltuneError) -> None:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


# --- verbs ------------------------------------------------------------------------------------------------------------


def _configuration(options: argparse.Namespace) -> Config:
    from veiltune.config import load_config
    from veiltune.designs import option_tables

    path = Path(options.config)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json":
        return load_config(path, overrides=options.set, options=option_tables())
    try:
        return load_config(json.loads(path.read_text(encoding="utf-8")), overrides=options.set, options=option_tables())
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}", hint=f"give {CONFIG_HELP}") from None


def _tune(options: argparse.Namespace) -> int:
    from veiltune.display import Display, console
    from veiltune.evaluation import RESULT, check_inputs, result_of
    from veiltune.parties import Job
    from veiltune.report import comparison_table, plot_losses
    from veiltune.results import write_result
    from veiltune.session import run_session

    config = _configuration(options)
    check_inputs(config)
    screen = console()
    with Display(screen, f"tuning {config.model} under {config.design}") as display:
        outcome = run_session(
            config, Job(verb="tune"), on_event=display, resume=options.resume, overwrite=options.overwrite
        )
    if outcome.interrupted:
        return _interrupted(options, outcome)
    output = Path(config.output)
    result = result_of(config, outcome)
    write_result(output / RESULT, result)
    plot_losses({config.design: result}, output / "loss.png")
    if options.json:
        print(result.model_dump_json(by_alias=True))
    screen.print(comparison_table({config.design: result}))
    made = ["adapter"] if config.adapter.goes_to("owner") else []
    screen.print(f"{', '.join([*made, RESULT, 'loss.png'])}: {output}", markup=False)
    return 0


def _interrupted(options: argparse.Namespace, outcome: Outcome) -> int:
    step = outcome.owner["history"]["step"]
    again = [
        "veiltune",
        "tune",
        options.config,
        "--resume",
        *(part for each in options.set for part in ("--set", each)),
    ]
    print(f"saved after step {step}; resume with: {shlex.join(again)}", file=sys.stderr)
    if options.json:
        print(json.dumps({"interrupted": True, "step": step, "resume": shlex.join(again)}))
    return INTERRUPTED


def _generate(options: argparse.Namespace) -> int:
    from veiltune.generating import run_generate

    names = ("max_new_tokens", "sample", "temperature", "top_p", "top_k", "seed")
    decoding = {name: getattr(options, name) for name in names}
    return run_generate(_configuration(options), options.prompt, decoding, as_json=options.json)


def _verify(options: argparse.Namespace) -> int:
    from veiltune.display import Display, console, verification_table
    from veiltune.evaluation import RESULT, verify
    from veiltune.results import to_json, write_result

    screen = console()
    with Display(screen, f"verifying {options.design} on {options.model}") as display:
        found = verify(
            options.model,
            options.design,
            overrides=options.set,
            dtype=options.dtype,
            steps=options.steps,
            processes=options.processes,
            output=options.output,
            against=options.against,
            on_event=display,
        )
    output = options.output or Path(tempfile.mkdtemp(prefix="veiltune-verify-"))
    write_result(output / RESULT, found.result)
    screen.print(verification_table(found))
    screen.print(f"recorded: {output / RESULT}", markup=False)
    failed: ExactnessError | None = None
    try:
        found.require()
    except ExactnessError as error:
        failed = error
        _say_error(error)
    if options.json:
        verdict = {} if failed is None else {"error": failed.message, "hint": failed.hint}
        shown: dict[str, Any] = {**asdict(found), "result": found.result.model_dump(mode="json", by_alias=True)}
        shown["checks"] = [
            {**asdict(check), "limit": check.limit, "is_within": check.is_within} for check in found.checks
        ]
        print(to_json({**verdict, "is_within": failed is None, "failures": found.failures, **shown}))
    return 0 if failed is None else failed.exit_code


def _inspect(options: argparse.Namespace) -> int:
    from veiltune.inspecting import run_inspect

    chosen = {"placement": options.placement, "enclave_layers": options.enclave_layers, "ancestors": options.ancestor}
    return run_inspect(options.model, **chosen, as_json=options.json)


def _protect(options: argparse.Namespace) -> int:
    from veiltune.display import Display, console
    from veiltune.results import to_json
    from veiltune.session.protection import protect_model

    screen = console()
    with Display(screen, f"protecting {options.model} for {options.design}") as display:
        made = protect_model(
            options.model,
            options.to,
            design=options.design,
            overrides=options.set,
            key=options.key,
            dtype=options.dtype,
            overwrite=options.overwrite,
            on_event=display,
        )
    screen.print(f"for the host: {made.directory} ({made.shards} shards)", markup=False)
    screen.print(f"for the enclave, and nobody else: {made.key}", markup=False)
    if options.json:
        print(to_json(made.as_json()))
    return 0


def _attack(options: argparse.Namespace) -> int:
    from veiltune.attacks import make_attack
    from veiltune.display import console
    from veiltune.evaluation.attacking import attack_run
    from veiltune.report.privacy import attack_table
    from veiltune.results import to_json

    attack = make_attack(options.attack, parse_settings(options.set))
    screen = console()
    attacked = attack_run(
        options.attacked,
        attack,
        moment=options.at,
        phase=options.phase,
        limit=options.limit,
        seed=options.seed,
        corpus=options.corpus,
        say=lambda line: screen.print(line, markup=False),
    )
    if options.json:
        nothing = None if attacked.nothing is None else asdict(attacked.nothing)
        rows = [finding.as_row() for finding in attacked.findings]
        print(to_json({"phase": attacked.phase, "nothing": nothing, "rows": rows}))
    screen.print(attack_table(attacked.findings))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from veiltune.comparing import run_compare

    flags = {"overwrite": options.overwrite, "retry_failed": options.retry_failed, "as_json": options.json}
    return run_compare(options.study, options.output, **flags)


def _advise(options: argparse.Namespace) -> int:
    from veiltune.display import console
    from veiltune.evaluation.advice import advise
    from veiltune.evaluation.advice_needs import read_needs
    from veiltune.evaluation.advice_table import advice_tables
    from veiltune.results import to_json

    advice = advise(read_needs(options.needs), options.records)
    if options.json:
        print(to_json(advice.as_json()))
    console().print(advice_tables(advice))
    return 0


def _party(options: argparse.Namespace) -> int:
    from veiltune.environment import start_again_as_party
    from veiltune.serving import run_owner, run_service

    if options.is_program and options.role != "owner":
        start_again_as_party()
    config = _configuration(options)
    if options.role == "owner":
        again = argparse.Namespace(**vars(options), overwrite=False)
        return run_owner(config, lambda resume: _tune(argparse.Namespace(**vars(again), resume=resume)))
    return run_service(config, options.role, listen=options.listen, health=options.health, as_json=options.json)


def _keygen(options: argparse.Namespace) -> int:
    from veiltune.transport.identity import make_identity, private_file, renew_identity

    made = (renew_identity if options.renew else make_identity)(options.to, options.role, days=options.days)
    secret = str(private_file(options.to, made.role))
    print(f"for this {made.role} alone: {secret}; for every party's configuration:", file=sys.stderr)
    fields = {"role": made.role, "key": made.pin, "file": secret}
    print(json.dumps(fields) if options.json else made.public_text().strip())
    return 0


def _attest(options: argparse.Namespace) -> int:
    from veiltune.attesting import Asked, run_attest

    if options.set and options.config is None:
        raise UserError("--set changes values of a configuration, and none is given", hint="give --config CONFIG")
    names = ("policy", "evidence", "nonce", "key", "to", "certificates")
    config = None if options.config is None else _configuration(options)
    return run_attest(Asked(config=config, **{name: getattr(options, name) for name in names}), as_json=options.json)


def _seal(options: argparse.Namespace) -> int:
    from veiltune.sealing import run_seal

    names = ("recipients", "key", "policy", "overwrite")
    chosen = {name: getattr(options, name) for name in names}
    return run_seal(options.what, options.to, **chosen, as_json=options.json)


def _demo(options: argparse.Namespace) -> int:
    from veiltune.demo import run_demo

    return run_demo(options.output, quick=options.quick, as_json=options.json)
