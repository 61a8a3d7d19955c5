"""The data owner: holds the text, runs the loop, and gets what comes of it.

Text is tokenised here and goes to the training engine as token ids; nobody else sees it unless the design says so.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veiltune.data import load_tokenized
from veiltune.errors import CheckpointError, DataError, PeerLostError
from veiltune.examples import TokenizedExample
from veiltune.models.adapters import save_adapter
from veiltune.models.checkpoint import load_tokenizer
from veiltune.models.families import find_family
from veiltune.models.family import Family
from veiltune.models.skeleton import config_from_json
from veiltune.models.trainable import save_layers
from veiltune.parties.enclaved.release import ADAPTER
from veiltune.parties.party import Party
from veiltune.training import COMMIT, Trainer
from veiltune.transport.messages import Goodbye, Interrupt, ModelCard, TokenizerFiles
from veiltune.transport.session_link import SessionLink
from veiltune.tuner import RemoteTuner, Tuner


class Owner:
    """The owner during one session: tokenizer, tuner, and the job at hand."""

    def __init__(self, party: Party, tuner: Tuner, tokenizer: Any, config: Any) -> None:
        self.party = party
        self.tuner = tuner
        self.tokenizer = tokenizer
        self.model_config = config
        self.family: Family = find_family(config)
        self._interrupted = False

    @property
    def pad_id(self) -> int:
        """Token for padding."""
        return int(self.tokenizer.pad_token_id)

    @property
    def longest(self) -> int:
        """Tokens a sequence may have: the model's positions."""
        return int(getattr(self.model_config, "max_position_embeddings", None) or sys.maxsize)

    def interrupted(self) -> bool:
        """Whether the supervisor asked to save and stop, or a party that is a service and is being stopped."""
        while not self._interrupted and self.party.control.poll():
            self._interrupted = isinstance(self.party.control.recv(), Interrupt)
        stopping = [link.peer for link in self.party.links.values() if isinstance(link, SessionLink) and link.stopping]
        if stopping and not self._interrupted:
            self._interrupted = True
            self.party.report("stopping", {"peer": stopping[0]})
        return self._interrupted

    def tokenized(self, source: str, *, split: str) -> list[TokenizedExample]:
        """Read, tokenise and check a data source."""
        longest = self.party.config.data.max_length
        if longest > self.longest:
            raise DataError(
                f"data.max_length {longest} exceeds the {self.longest} positions of this model",
                hint=f"set data.max_length to at most {self.longest}",
            )
        return load_tokenized(source, self.party.config, self.tokenizer, split=split)

    # --- the jobs -------------------------------------------------------------------------------------------------------

    def tune(self) -> None:
        """Train, checkpoint, export the adapter, measure."""
        party = self.party
        config = party.config
        if config.data.train is None:
            raise DataError("there is nothing to train on: data.train is not set", hint='add [data] train = "FILE"')
        examples = self.tokenized(config.data.train, split="train")
        held_out = [] if config.data.validation is None else self.tokenized(config.data.validation, split="validation")
        if party.job.resume_step is None and config.evaluate.before:
            self.measure("before")
        trainer = Trainer(
            self.tuner,
            config,
            examples,
            held_out,
            pad_id=self.pad_id,
            report=party.report,
            interrupted=self.interrupted,
        )
        if party.job.resume_step is not None:
            trainer.resume(_read_commit(Path(config.output)))
        party.figures["data"] = {
            "train_examples": len(examples),
            "validation_examples": len(held_out),
            "train_tokens": sum(len(example.input_ids) for example in examples),
        }
        self.before_training(examples, held_out)
        party.report("training", {"examples": len(examples), "total_steps": trainer.total})
        history = trainer.run()
        party.figures["history"] = asdict(history)
        if not history.interrupted:
            self.export()
            self.after_training()
            self.measure("after")
            if party.job.prompt is not None:
                self._answer()

    def evaluate(self) -> None:
        """Measure the model as it is, or as a checkpoint left it."""
        if self.party.job.resume_step is not None:
            self.tuner.load(self.party.job.resume_step)
        self.measure("after")

    def generate(self) -> None:
        """Stream an answer to the prompt; its text goes to the supervisor, which is the owner's own."""
        if self.party.job.resume_step is not None:
            self.tuner.load(self.party.job.resume_step)
        self._answer()

    def _answer(self) -> None:
        job = self.party.job
        text = self._chat_prompt(job.prompt or "")
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=not self.tokenizer.chat_template)[
            "input_ids"
        ]
        wanted = ids.shape[1] + int(job.settings.get("max_new_tokens", 0))
        if ids.shape[1] == 0 or wanted > self.longest:
            raise DataError(
                f"a prompt of {ids.shape[1]} tokens and its answer make {wanted}; the model takes 1 to {self.longest}",
                hint="shorten the prompt or lower --max-new-tokens"
                if ids.shape[1]
                else "give a prompt that is not empty",
            )
        settings = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.pad_id, **job.settings}
        tokens: list[int] = []
        shown = ""
        for token in self.tuner.generate(ids, settings):
            tokens.append(token)
            decoded = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if not decoded.endswith("\ufffd"):  # a character that is not whole yet
                self.party.report("text", {"text": decoded[len(shown) :]})
                shown = decoded
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if text != shown:  # it ends in half a character after all
            self.party.report("text", {"text": text[len(shown) :]})
        self.party.figures["generated"] = {"prompt": job.prompt, "text": text, "tokens": tokens}

    def _chat_prompt(self, prompt: str) -> str:
        if not self.tokenizer.chat_template:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def probe(self) -> None:
        """Logits, loss, gradients and the adapter after a few steps, on the job's token ids, written for comparison."""
        from safetensors.torch import save_file

        probe = self.party.job.probe
        if self.party.job.resume_step is not None:
            self.tuner.load(self.party.job.resume_step)
        ids = torch.tensor(probe["input_ids"], dtype=torch.int64)
        mask = torch.ones_like(ids)
        found: dict[str, Tensor] = {"logits": self.tuner.logits(ids, mask)}
        targets = ids.shape[0] * (ids.shape[1] - 1)
        losses: list[float] = []
        for step in range(int(probe["steps"])):
            losses.append(self.tuner.accumulate(ids, mask, ids, targets) / targets)
            if step == int(probe["steps"]) - 1:
                found.update({f"gradient:{name}": value for name, value in self.tuner.gradients().items()})
            self.tuner.step(self.party.config.train.learning_rate)
        found["logits_tuned"] = self.tuner.logits(ids, mask)
        found.update({f"adapter:{name}": value for name, value in self.tuner.adapter().items()})
        found["losses"] = torch.tensor(losses, dtype=torch.float64)
        if probe.get("generate"):
            settings = {
                "do_sample": False,
                "max_new_tokens": int(probe["generate"]),
                "min_new_tokens": int(probe["generate"]),
            }
            found["tokens"] = torch.tensor(list(self.tuner.generate(ids[:1], settings)))
        save_file(
            {name: value.detach().contiguous().clone() for name, value in found.items()},
            self.party.directory / "probe.safetensors",
        )

    def provision(self) -> None:
        """The model has reached its places; ask for the figures and end."""

    def leave(self) -> None:
        """Ask for the figures and let everyone go."""
        self.party.figures["engine"] = self.tuner.figures()
        for link in self.party.links.values():
            try:
                link.send(Goodbye())
            except PeerLostError:
                self.party.report("peer_gone", {"peer": link.peer})

    # --- parts of jobs --------------------------------------------------------------------------------------------------

    def before_training(self, examples: Sequence[TokenizedExample], held_out: Sequence[TokenizedExample]) -> None:
        """What a design does with the text before the first step; nothing by default."""

    def after_training(self) -> None:
        """What a design does once the result is exported, before it is measured; nothing by default."""

    def export(self) -> None:
        """Write the result into the output directory: an adapter in PEFT's format, or the trained layers.

        Where ``adapter.to`` says so the provider gets it too, or instead.
        """
        config = self.party.config
        if config.adapter.goes_to("provider"):
            self.tuner.hand_over()
        if not config.adapter.goes_to("owner"):
            self.party.report("exported", {"directory": None})
            return
        tensors = self.tuner.adapter()
        directory = Path(config.output) / (ADAPTER if config.train.method == "lora" else "layers")
        if config.train.method == "full":
            save_layers(directory, tensors)
        else:
            num_layers = self.model_config.num_hidden_layers
            save_adapter(directory, tensors, config.lora, self.family, num_layers, config.model)
        self.party.report("exported", {"directory": directory.name})

    def measure(self, when: str) -> None:
        """Accuracy on the configured tasks as the model is now, kept among the figures under ``when``."""
        evaluate = self.party.config.evaluate
        if not evaluate.tasks:
            return
        from veiltune.tasks import DEFAULT_MAX_LENGTH
        from veiltune.tasks import evaluate as evaluate_tasks

        self.party.report("measuring", {"when": when, "tasks": list(evaluate.tasks)})
        measured = evaluate_tasks(
            evaluate.tasks,
            lambda pairs: self.tuner.score(pairs, pad_id=self.pad_id),
            self.tokenizer,
            limit=evaluate.limit,
            max_length=min(DEFAULT_MAX_LENGTH, self.longest),
            progress=lambda done, total: self.party.report("scored", {"done": done, "total": total}),
        )
        utility = {task: asdict(value) for task, value in measured.items()}
        self.party.figures.setdefault("utility", {})[when] = utility
        self.party.report("utility", {"when": when, "utility": utility})


JOBS: dict[str, Callable[[Owner], None]] = {
    "tune": Owner.tune,
    "evaluate": Owner.evaluate,
    "generate": Owner.generate,
    "probe": Owner.probe,
    "provision": Owner.provision,
}


def join(party: Party, trainer: str, *, attested: bool) -> Owner:
    """The owner's first words: have the enclave prove itself, and get the tokenizer."""
    if attested:
        party.require_enclave(trainer)
    card = party.links["provider"].recv_as(ModelCard)
    files = party.links["provider"].recv_as(TokenizerFiles).files
    party.figures["model"] = asdict(card)
    tuner = RemoteTuner(party.links[trainer])
    return Owner(party, tuner, tokenizer_from(files, party.config.model), config_from_json(card.config))


def own(party: Party, join: Callable[[Party], Owner]) -> None:
    """Run the owner: join the session, do the job, take leave.

    Raises:
        DataError: the data cannot be used. Others come from what the job does.
        PeerLostError: a party went away, and did not come back if it is a service.
    """
    owner = join(party)
    JOBS[party.job.verb](owner)
    owner.leave()


def tokenizer_from(files: dict[str, Tensor], source: str) -> Any:
    """The tokenizer from its files.

    Raises:
        ModelError: they are not those of one.
    """
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            (Path(directory) / Path(name).name).write_bytes(content.numpy().tobytes())
        return load_tokenizer(Path(directory), source)


def _read_commit(output: Path) -> dict[str, Any]:
    import json

    try:
        return json.loads((output / COMMIT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no checkpoint to resume in {str(output)!r}: {error}", hint="start anew without --resume"
        ) from None
