"""DPO on TRL's trainer: ours are the tokens that it sees, the forward, and the loss, which comes through the hook."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
import trl
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from alignkit import AlignkitError, PreferenceLogps, Run
from alignkit.batches import Sampling
from alignkit.data.encoding import Ranked, encode_rankings
from alignkit.evaluation import error_bar, read_answers_before, write_answers
from alignkit.generation.sampling import sample, text
from alignkit.models import adapters, fused_head, trl_internals
from alignkit.models.trunk import use_adapter
from alignkit_dpo.pairs import Collator, inputs, pairs_of
from alignkit_dpo.reference import Reference, reference_of
from alignkit_dpo.shared import shared_prompt

if TYPE_CHECKING:
    from alignkit_dpo.config import DPOConfig

FORWARD = ("input_ids", "attention_mask", "position_ids", "labels")  # what the model takes of a batch


def build(run: Run) -> DPOTrainer:
    """Tokenise the rankings, load the policy and its reference, and put all into a trainer."""
    config: DPOConfig = run.config.stage.config
    if config.precompute_ref_log_probs and run.processes > 1:
        raise AlignkitError("dpo.precompute_ref_log_probs: TRL keeps what it finds in a file of one process alone")
    rankings = encode_rankings(run, run.train_rows, config.max_length, config.too_long)
    held_out = encode_rankings(run, run.eval_rows, config.max_length, config.too_long) if run.eval_rows else []
    pairs = pairs_of(rankings)
    run.say(f"{len(pairs)} pairs from {len(rankings)} rankings")
    args = run.training_arguments(
        trl.DPOConfig,
        max_length=None,  # answers are refused or left out above, never cut
        precompute_ref_batch_size=run.config.train["per_device_eval_batch_size"],
        remove_unused_columns=False,
    )
    loss, optimizer = run.loss(), run.optimizer(args)  # before the model: they may refuse
    policy: Any = adapters.without_dropout(run.model("policy"))
    whole = not hasattr(policy, "peft_config")
    started = "policy" in run.records and run.records["policy"]["weights"] == "adapter"
    reference = reference_of(run.config, adapters=not whole, started=started)
    if reference.kind in ("adapter", "base"):
        adapters.check_apart(policy)
    args.precompute_ref_log_probs = reference.precomputed or (whole and reference.kind == "none")  # TRL loads one else
    collator = Collator(run.tokenizer.pad_token_id, shared_prompt(run, policy, pairs, args.device))
    trainer = DPOTrainer(
        run=run,
        loss=loss,
        reference=reference,
        held_out=held_out,
        optimizer_cls_and_kwargs=optimizer,
        model=policy,
        ref_model=copy.deepcopy(policy).requires_grad_(False).eval() if reference.kind == "model" else None,
        args=args,
        data_collator=collator,
        train_dataset=datasets.Dataset.from_list(pairs),
        eval_dataset=datasets.Dataset.from_list(pairs_of(held_out)) if held_out else None,
        processing_class=run.tokenizer,
        callbacks=run.callbacks(),
    )
    fused_head.is_fused(trainer.model, run.say)
    return trainer


class DPOTrainer(trl.DPOTrainer):
    """``trl.DPOTrainer`` with a loss that is a function of :class:`alignkit.PreferenceLogps`."""

    loss_is_scaled_for_ga = True  # the loss is divided by the pairs of the whole optimizer step

    def __init__(
        self,
        *,
        run: Run,
        loss: Any,
        reference: Reference,
        held_out: Sequence[Ranked],
        optimizer_cls_and_kwargs: Any,
        **kwargs: Any,
    ) -> None:
        self.run, self.loss, self.reference, self.dpo = run, loss, reference, run.config.stage.config
        self.beta_of_rewards = getattr(run.config.loss.config, "beta", 1.0)
        self.prompts = list({tuple(r.branches.prompt): r for r in held_out}.values())[: self.dpo.eval_prompts]
        self.sampling = Sampling(self.dpo.response_length, temperature=1.0, stop_ids=tuple(run.stop_ids))
        self.before: list[str | None] = []  # what the policy answered before training
        self.sampled: dict[str, float] = {}  # figures of its answers now
        self._sums: dict[str, Any] = defaultdict(float)  # over the pairs since the last log
        self._held_out: list[dict[str, Tensor]] = []  # of each batch of an evaluation
        model = kwargs["model"]
        self._unrounded = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        for each in (model, kwargs["ref_model"]):
            if each is not None:
                fused_head.install(each)
        with trl_internals.adapter_on_head():
            super().__init__(**kwargs)
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self._unround()
        self._unrounded.clear()
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")  # TRL's copy, which leaves adapters of embeddings out
        if reference.kind == "adapter":
            adapters.copy_adapter(model, "default", "ref", trained=False)
            adapters.without_dropout(model)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """As it is: it holds token ids."""
        return dataset

    def _unround(self) -> None:
        """Take back that TRL rounds the adapters of a quantised model to bf16."""
        for name, p in self.model.named_parameters():
            if name in self._unrounded and p.dtype is not self._unrounded[name].dtype:
                p.data = self._unrounded.pop(name).to(p.device)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's, where the loss needs a reference."""
        if not self.reference.precomputed:
            return dataset
        self._unround()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of chosen and rejected answers, [B] each. TRL calls it before training: the policy is the reference then."""
        with torch.no_grad(), self.accelerator.autocast():
            logps, _ = answer_logps(model, inputs)
        chosen, rejected = inputs["pairs"].T
        return logps[chosen], logps[rejected]

    # --- one optimizer step ------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The microbatches of a step, and how many pairs they hold on all ranks: the loss is a mean over pairs."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(len(batch["pairs"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(pairs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a microbatch, as its share of the step's."""
        chosen, rejected = inputs["pairs"].T
        experts = {"output_router_logits": True} if self.aux_loss_enabled and model.training else {}
        logps, aux_loss = answer_logps(model, inputs, **experts)
        ref_chosen, ref_rejected = inputs.get("ref_chosen_logps"), inputs.get("ref_rejected_logps")
        if self.reference.needed and ref_chosen is None:
            theirs = self.ref_logps(inputs)
            ref_chosen, ref_rejected = theirs[chosen], theirs[rejected]
        batch = PreferenceLogps(
            chosen=logps[chosen],
            rejected=logps[rejected],
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_length=inputs["lengths"][chosen],
            rejected_length=inputs["lengths"][rejected],
        )
        output = self.loss(batch)
        self._note(model.training, batch, inputs["number"], output)
        loss: Tensor = output.loss
        if model.training:
            self._sums["seen"] += inputs["tokens"].sum()
            loss = loss * len(chosen) / num_items_in_batch * self.accelerator.num_processes
            if aux_loss is not None:
                loss = loss + self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps
        return loss

    def ref_logps(self, inputs: dict[str, Tensor]) -> Tensor:
        """The log-probability of each answer of a batch under the reference, [N]."""
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self._as_reference() as model,
        ):
            return answer_logps(model, inputs)[0]

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[Any]:
        if self.reference.kind == "model":
            yield self.ref_model
        else:
            adapter = "ref" if self.reference.kind == "adapter" else None
            with use_adapter(self.accelerator.unwrap_model(self.model), adapter):
                yield self.model

    def _note(self, training: bool, batch: PreferenceLogps, number: Tensor, output: Any) -> None:
        """Keep the figures of a batch: in training their sums, in an evaluation those of every pair."""
        with torch.no_grad():
            chosen, rejected = self._rewards(batch)
            count = len(chosen)
            found = {
                "loss": output.loss.expand(count),
                "accuracy": (chosen > rejected).float() + 0.5 * (chosen == rejected),
                "margin": chosen - rejected,
                "rewards_chosen": chosen,
                "rewards_rejected": rejected,
                "logps_chosen": batch.chosen,
                "logps_rejected": batch.rejected,
                **{name: torch.full_like(chosen, float(value)) for name, value in output.metrics.items()},
            }
        if training:
            self._sums["pairs"] += count
            for name, values in found.items():
                self._sums[name] += values.sum().detach()
        else:
            self._held_out.append(self.accelerator.gather_for_metrics({**found, "number": number}))

    def _rewards(self, batch: PreferenceLogps) -> tuple[Tensor, Tensor]:
        """The rewards that the policy implies: beta times the log-ratio, or without a reference the mean of a token."""
        if batch.ref_chosen is None or batch.ref_rejected is None:
            chosen, rejected = batch.chosen / batch.chosen_length, batch.rejected / batch.rejected_length
        else:
            chosen, rejected = batch.chosen - batch.ref_chosen, batch.rejected - batch.ref_rejected
        return self.beta_of_rewards * chosen, self.beta_of_rewards * rejected

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add means over pairs, of all microbatches and ranks, to what the Trainer logs."""
        if self._held_out and any(name.startswith("eval_") for name in logs):
            found = {name: torch.cat([part[name] for part in self._held_out]) for name in self._held_out[0]}
            number = found.pop("number").cpu()
            logs.update({f"eval_{name}": float(values.double().mean()) for name, values in found.items()})
            logs.update(error_bar("eval_accuracy_error", found["accuracy"].cpu(), number))
            logs["eval_pairs"] = len(number)
            logs.update(self.sampled)
            self._held_out.clear()
        elif "loss" in logs:
            sums = {
                n: float(self.accelerator.reduce(torch.as_tensor(v).to(self.args.device)))
                for n, v in self._sums.items()
            }
            pairs, seen = sums.pop("pairs"), sums.pop("seen")
            logs.update({name: value / pairs for name, value in sums.items() if name != "loss"})
            former = [log["num_tokens"] for log in self.state.log_history if "num_tokens" in log]
            logs["num_tokens"] = (former[-1] if former else 0) + seen
            self._sums.clear()
        super().log(logs, start_time)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss, accuracy and margin on the held-out pairs; KL, length and end rate of answers to their prompts."""
        self._held_out.clear()
        self.sampled = self._answer() if self.prompts else {}
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    @torch.no_grad()
    def _answer(self) -> dict[str, float]:
        """Answer held-out prompts, write the table of answers before and after, and give the figures."""
        policy = self.accelerator.unwrap_model(self.model).eval()
        size, tokenizer = self.args.per_device_eval_batch_size, self.run.tokenizer
        answers: list[list[int]] = []
        kl: list[float] = []
        with _own_randomness(self.args.seed, self.args.device), self.accelerator.autocast():
            for start in range(0, len(self.prompts), size):
                ids = [ranked.branches.prompt for ranked in self.prompts[start : start + size]]
                some = sample(policy, tokenizer, ids, self.sampling)
                answers += some
                if self.reference.kind != "none":
                    groups = [(prompt, [answer]) for prompt, answer in zip(ids, some, strict=True)]
                    batch = self._prepare_inputs(inputs(groups, Collator(tokenizer.pad_token_id)))
                    kl += (answer_logps(policy, batch)[0] - self.ref_logps(batch)).tolist()
        texts = [text(tokenizer, answer) for answer in answers]
        if not self.before:
            former = read_answers_before(self.run.folder)
            self.before = former or (list(texts) if self.state.global_step == 0 else [None] * len(texts))
        if self.is_world_process_zero():
            columns = {"kl": kl} if kl else {}
            prompts = [ranked.prompt for ranked in self.prompts]
            write_answers(self.run.folder, prompts, self.before, texts, **columns)
        ended = [answer[-1] in self.sampling.stop_ids for answer in answers]
        return {
            **({"eval_kl": sum(kl) / len(kl), **error_bar("eval_kl_error", kl)} if kl else {}),
            "eval_length": sum(map(len, answers)) / len(answers),
            "eval_eos_rate": sum(ended) / len(ended),
        }

    # --- what is saved -----------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The policy alone: the reference is in its own run folder already."""
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / "ref", ignore_errors=True)


def answer_logps(model: Any, inputs: dict[str, Tensor], **more: Any) -> tuple[Tensor, Tensor | None]:
    """The log-probability of each answer of a batch, [N], which is the sum over its tokens; and experts' balance."""
    outputs = fused_head.forward(model, {**{name: inputs[name] for name in FORWARD if name in inputs}, **more})
    tokens = outputs.log_probs[inputs["rows"][:, None], inputs["columns"]]  # [N, A]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.masked_fill(places >= inputs["lengths"][:, None], 0).sum(1), outputs.aux_loss


@contextlib.contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of ``seed``; those of training go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
