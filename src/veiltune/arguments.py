"""The command line's verbs and options, and how they are parsed. Nothing is imported that is slow."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from veiltune import __version__
from veiltune.errors import UserError
from veiltune.study_terms import PHASES

VERBS = (
    *("demo", "tune", "generate", "verify", "inspect", "protect", "attack", "compare", "advise", "party", "keygen"),
    *("attest", "seal"),
)
MODEL_HELP = (
    "hub id, directory, GGUF file, package:DISTRIBUTION, random:FAMILY[:layers,hidden,heads,vocab] or sealed:FILE"
)
CONFIG_HELP = "a TOML file, or a run's output directory (its config.json)"

Command = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Errors of the command line look like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, hint=f"see `{self.prog} --help`")


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of every verb; a parsed command's ``run`` is the one of ``commands`` that carries it out.

    Its errors are UserError, and look like all others.
    """
    parser = _Parser(
        prog="veiltune",
        description="Fine-tune and use one language model among a model provider, a data owner and a host that do not "
        "trust one another.",
    )
    parser.add_argument("--version", action="version", version=f"veiltune {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    _add_demo(verbs, commands["demo"])
    _add_tune(verbs, commands["tune"])
    _add_generate(verbs, commands["generate"])
    _add_verify(verbs, commands["verify"])
    _add_inspect(verbs, commands["inspect"])
    _add_protect(verbs, commands["protect"])
    _add_attack(verbs, commands["attack"])
    _add_compare(verbs, commands["compare"])
    _add_advise(verbs, commands["advise"])
    _add_party(verbs, commands["party"])
    _add_keygen(verbs, commands["keygen"])
    _add_attest(verbs, commands["attest"])
    _add_seal(verbs, commands["seal"])
    return parser


def _add_demo(verbs: Any, run: Command) -> None:
    demo = _add(verbs, "demo", run, "the main job on a real model and real data, start to end")
    demo.add_argument("--quick", action="store_true", help="a few steps and few items: minutes, and wide intervals")
    demo.add_argument("--output", type=Path, default=Path("veiltune-demo"), help="directory (default: %(default)s)")


def _add_tune(verbs: Any, run: Command) -> None:
    tune = _add(verbs, "tune", run, "fine-tune under a design; writes an adapter in PEFT's format and result.json")
    _add_config(tune)
    existing = tune.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the output directory"
    )
    existing.add_argument("--overwrite", action="store_true", help="replace an earlier run in the output directory")


def _add_generate(verbs: Any, run: Command) -> None:
    generate = _add(verbs, "generate", run, "stream an answer from the protected model, tuned if the run was")
    _add_config(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=_integer(1), default=128, metavar="N", help="default: %(default)s")
    generate.add_argument("--sample", action="store_true", help="draw tokens; without it the likeliest is taken")
    generate.add_argument("--temperature", type=_number(0, None), metavar="T", help="with --sample (implied)")
    generate.add_argument("--top-p", type=_number(0, 1), metavar="P", help="with --sample (implied)")
    generate.add_argument("--top-k", type=_integer(1), metavar="K", help="with --sample (implied)")
    generate.add_argument(
        "--seed", type=_integer(0), metavar="N", help="of the draw (default: a fresh one, which is shown)"
    )


def _add_verify(verbs: Any, run: Command) -> None:
    verify = _add(verbs, "verify", run, "show on this machine that a design computes the plain model's function")
    verify.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    verify.add_argument("--design", default="obfuscatune", metavar="NAME", help="default: %(default)s")
    verify.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="say obfuscatune.matrix=gaussian"
    )
    verify.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    verify.add_argument(
        "--steps", type=_integer(1), default=3, metavar="N", help="training steps (default: %(default)s)"
    )
    verify.add_argument(
        "--against", choices=("own", "orthogonal"), default="own", help="whose condition number bounds it"
    )
    verify.add_argument("--processes", action="store_true", help="every party its own process (default: threads)")
    verify.add_argument("--output", type=Path, metavar="DIR", help="keep both runs and result.json there")


def _add_inspect(verbs: Any, run: Command) -> None:
    inspect = _add(
        verbs, "inspect", run, "how each design would cut a model, and who sees what; or what a run revealed"
    )
    inspect.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; or a run's output directory")
    inspect.add_argument(
        "--ancestor",
        action="append",
        default=[],
        metavar="OTHER",
        help="a public model: would its weights give the keys of this one away?",
    )
    inspect.add_argument("--placement", choices=("compact", "paper"), help="of obfuscatune (default: both)")
    inspect.add_argument(
        "--enclave-layers", type=_integer(0), action="append", default=[], metavar="N", help="of veil (default: 1)"
    )


def _add_protect(verbs: Any, run: Command) -> None:
    protect = _add(
        verbs, "protect", run, "put a model's trunk in its secret basis on disk, once; goes on where it stopped"
    )
    protect.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    protect.add_argument("--to", type=Path, required=True, metavar="DIR", help="the host's: the protected checkpoint")
    protect.add_argument(
        "--key", type=Path, metavar="FILE", help="the enclave's: the key (default: DIR.enclave/protection.key)"
    )
    protect.add_argument("--design", default="veil", metavar="NAME", help="default: %(default)s")
    protect.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="say veil.enclave_layers=2")
    protect.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float64"), help="of sessions with it (default: as stored)"
    )
    protect.add_argument("--overwrite", action="store_true", help="begin anew, with a fresh key")


def _add_attack(verbs: Any, run: Command) -> None:
    attack = _add(
        verbs, "attack", run, "attack what one observer saw of a recorded run; with controls, into result.json"
    )
    attack.add_argument("attacked", metavar="RUN", type=Path, help="output directory of a run with session.record")
    attack.add_argument(
        "--attack", required=True, metavar="NAME", help="see the documentation; an unknown name lists them"
    )
    attack.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the attack")
    attack.add_argument(
        "--at",
        choices=("first", "last"),
        default="first",
        help="texts that crossed first, or last, when layers were tuned",
    )
    attack.add_argument(
        "--phase",
        choices=tuple(PHASES),
        help="which of the owner's texts (default: the first of these of which something crossed)",
    )
    attack.add_argument(
        "--limit", type=_integer(2), default=8, metavar="N", help="sequences to reconstruct (default: %(default)s)"
    )
    attack.add_argument("--corpus", metavar="DATA", help="public text for learned attacks (default: a packaged task)")
    attack.add_argument("--seed", type=_integer(0), default=0, metavar="N", help="default: %(default)s")


def _add_compare(verbs: Any, run: Command) -> None:
    compare = _add(
        verbs, "compare", run, "run designs, attacks and seeds of a study, and report; goes on where it stopped"
    )
    compare.add_argument(
        "study", metavar="STUDY", help="a TOML file, or one that comes along: small, strong, sweeps, positions, deep"
    )
    compare.add_argument("--output", type=Path, metavar="DIR", help="directory (default: veiltune-compare-STUDY)")
    compare.add_argument("--overwrite", action="store_true", help="forget what was measured there before")
    compare.add_argument("--retry-failed", action="store_true", help="try cells again that failed before")


def _add_advise(verbs: Any, run: Command) -> None:
    advise = _add(verbs, "advise", run, "which recorded designs meet stated needs, and why the others do not")
    advise.add_argument("needs", metavar="NEEDS", type=Path, help="a TOML file")
    advise.add_argument(
        "--records",
        type=Path,
        metavar="DIR",
        help="a comparison's output, or its results.jsonl (default: the needs' own)",
    )


def _add_party(verbs: Any, run: Command) -> None:
    party = _add(verbs, "party", run, "run one party as a service, for sessions whose configuration names its address")
    party.add_argument("role", metavar="ROLE", help="provider, enclave or host; owner: tune with those that run")
    _add_config(party)
    party.add_argument(
        "--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="default: a free port of this machine alone"
    )
    party.add_argument(
        "--health", metavar="HOST:PORT", help="serve /healthz, /readyz and /metrics there (default: session.health)"
    )


def _add_keygen(verbs: Any, run: Command) -> None:
    keygen = _add(verbs, "keygen", run, "make a party's key, by which its peers on other machines know it")
    keygen.add_argument("role", metavar="ROLE", help="provider, owner, host or enclave")
    keygen.add_argument("--to", type=Path, default=Path(), metavar="DIR", help="where ROLE.key goes (default: here)")
    keygen.add_argument(
        "--days",
        type=_integer(1),
        default=730,
        metavar="N",
        help="how long its certificate holds (default: %(default)s)",
    )
    keygen.add_argument(
        "--renew", action="store_true", help="a new certificate for the key that is there; its name stays"
    )


def _add_attest(verbs: Any, run: Command) -> None:
    attest = _add(verbs, "attest", run, "evidence of this machine's trusted hardware, or a file of it, under a policy")
    attest.add_argument("--policy", type=Path, metavar="FILE", help="what is accepted; without one nothing is verified")
    attest.add_argument("--evidence", type=Path, metavar="FILE", help="look at this, not at this machine")
    attest.add_argument(
        "--nonce", metavar="HEX", help="64 digits that the verifier drew, which the evidence is to be for"
    )
    attest.add_argument("--config", metavar="CONFIG", help="a run's configuration, which the evidence is to be for")
    attest.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of --config")
    attest.add_argument(
        "--key", type=Path, metavar="FILE", help="put this key for sealed containers into the evidence; made if absent"
    )
    attest.add_argument("--to", type=Path, metavar="FILE", help="write this machine's evidence there")
    attest.add_argument(
        "--certificates", type=Path, metavar="DIR", help="AMD's, for SEV-SNP hosts that provide none (vcek, ask, ark)"
    )


def _add_seal(verbs: Any, run: Command) -> None:
    seal = _add(verbs, "seal", run, "encrypt a model or a file of data, so that its recipients alone can open it")
    seal.add_argument("what", metavar="WHAT", help=f"a file of data, or a model: {MODEL_HELP}")
    seal.add_argument("--to", type=Path, required=True, metavar="FILE", help="the container")
    seal.add_argument(
        "--for",
        dest="recipients",
        action="append",
        default=[],
        metavar="RECIPIENT",
        help="ROLE.recipient.toml, or evidence with a key (`veiltune attest --key`); may be repeated",
    )
    seal.add_argument("--key", type=Path, metavar="FILE", help="your own private key, to open it again; made if absent")
    seal.add_argument("--policy", type=Path, metavar="FILE", help="what evidence in --for has to meet")
    seal.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """``key=value`` settings of an attack; values are TOML, bare words are text.

    Raises:
        UserError: one is not of that form.
    """
    import tomllib

    found: dict[str, Any] = {}
    for each in given:
        key, separator, text = each.partition("=")
        if not separator:
            raise UserError(f"--set {each!r} is not key=value", hint="for example --set pairs=64")
        try:
            found[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = text
    return found


def _add(verbs: Any, name: str, run: Command, what: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    parser.set_defaults(run=run)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, say train.steps=50")


def _integer(least: int) -> Any:
    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return int(text)

    return integer


def _number(above: float, most: float | None) -> Any:
    def number(text: str) -> float:
        value = float(text)
        if not value > above or (most is not None and value > most):
            raise argparse.ArgumentTypeError(
                f"{text} is not above {above:g}" + (f" and at most {most:g}" if most else "")
            )
        return value

    return number
