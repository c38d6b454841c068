"""python tests/mutations.py [NAME …]: break the method in small ways, one at a time, and see that a test notices.

Works on a copy of the project in a temporary directory. Prints ``killed`` or ``SURVIVED`` a mutation; exits with 1 if
one survives or no longer applies to the source.
"""

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300  # seconds; a mutation that hangs is noticed, too
FAILED, HUNG, ANOTHER = 1, -1, -2  # exit codes: pytest's for failed tests, and ours


class Mutation(NamedTuple):
    """Replace ``old``, which occurs once in lpo_fast/``file``, by ``new``; one of ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def of(file: str, tests: str, *changes: tuple[str, str, str]) -> Iterator[Mutation]:
    """Mutations of one file, seen by the same tests."""
    return (Mutation(name, file, old, new, tuple(tests.split())) for name, old, new in changes)


MUTATIONS: list[Mutation] = [
    *of("loss.py", "test_loss.py",
        ("guidance with null and text swapped", "return null + scale * (text - null)",
         "return text + scale * (null - text)"),
        ("log ratio with sigma, not its square", "product.flatten(1).mean(1) / (2 * sigma**2)",
         "product.flatten(1).mean(1) / (2 * sigma)"),
        ("log ratio summed, not averaged", "return product.flatten(1).mean(1)", "return product.flatten(1).sum(1)"),
        ("log ratio without the half", "return product.flatten(1).mean(1) / (2 * sigma**2)",
         "return product.flatten(1).mean(1) / sigma**2"),
        ("log ratio of reference to policy", "(mean_policy - mean_ref) * (2", "(mean_ref - mean_policy) * (2"),
        ("log density without the square", "(x_p - mean).square()", "(x_p - mean).abs()"),
        ("log density summed, not averaged", ".square().flatten(1).mean(1)", ".square().flatten(1).sum(1)"),
        ("log density without log sigma", " - sigma.log() - HALF_LOG_2PI", " - HALF_LOG_2PI"),
        ("no clamp", "(log_ratio(x_p).clamp(low, high) for", "(log_ratio(x_p) for"),
        ("clamp without gradient of the free members", "(log_ratio(x_p).clamp(low, high) for",
         "(log_ratio(x_p).detach().clamp(low, high) for"),
        ("clamp of the logarithm at plus and minus eps",
         "low, high = math.log1p(-eps) if eps < 1 else -math.inf, math.log1p(eps)", "low, high = -eps, eps"),
        ("eps of 1 and more is an error", "math.log1p(-eps) if eps < 1 else -math.inf", "math.log1p(-eps)"),
        ("winner and loser swapped in the loss", "beta * (log_win - log_lose)", "beta * (log_lose - log_win)"),
        ("winner and loser swapped", "for x_p in (winner, loser))", "for x_p in (loser, winner))"),
        ("beta left out", "-F.logsigmoid(beta * (", "-F.logsigmoid(1 * ("),
        ("log of sigmoid", "-F.logsigmoid(beta * (log_win - log_lose))",
         "-torch.sigmoid(beta * (log_win - log_lose)).log()"),
        ("padding counts", "StepDPO((weight * pair_loss).sum()", "StepDPO(pair_loss.mean()"),
        ("accuracy of the losers", "(win > lose).to(dtype)", "(win < lose).to(dtype)"),
        ("padding counts in the metrics", "(weight * torch.stack(metrics)).sum(1)", "torch.stack(metrics).mean(1)"),
        ("reference without guidance", "guide(*(m.to(dtype) for m in reference), guidance)",
         "guide(*(m.to(dtype) for m in reference), 1.0)"),
        ("ties cost their entropy", "torch.where(label_0 == label_1, math.log(0.5), 0.0)",
         "torch.where(label_0 == label_1, 0.0, 0.0)"),
        ("labels swapped", "label_0 * losses[diagonal, first] + label_1 * losses[diagonal, second]",
         "label_1 * losses[diagonal, first] + label_0 * losses[diagonal, second]"),
        ("image half over images", "-logits.T.log_softmax(-1).view", "-logits.log_softmax(-1).T.reshape"),
        ("prompts with many pairs weigh more", "weight = 1 / num_examples", "weight = 1.0 * num_examples"),
        ("weights not normalised", "weight / weight.sum()", "weight / len(weight)"),
        ("auxiliary weight on equal timesteps", "timesteps[:, 0] != timesteps[:, 1], aux",
         "timesteps[:, 0] == timesteps[:, 1], aux")),
    *of("select.py", "test_select.py",
        ("best and worst swapped", "best, worst = scores.max(0), scores.min(0)",
         "worst, best = scores.max(0), scores.min(0)"),
        ("invalid pairs are valid", "margin > gap)", "margin < gap)"),
        ("an equal margin is valid", "margin > gap)", "margin >= gap)"),
        ("threshold upside down", "low + (curve - first)", "high - (curve - first)"),
        ("threshold from the first timestep", "low + (curve - first)", "low + (curve - last)"),
        ("gap of half the threshold", "return 2 * torch.atanh", "return 1 * torch.atanh"),
        ("threshold of probabilities taken for a gap", "2 * torch.atanh(threshold.clamp(0, 1))", "threshold"),
        ("sigma for variance", '"variance": sigma**2', '"variance": sigma')),
    *of("schedule.py", "test_schedule.py",
        ("t for p", "a_p = a[p]", "a_p = a"),
        ("p below 0 is the clean image", ".clamp(min=0)\n    a_p = a[p]", "\n    a_p = torch.where(p < 0, 1.0, a[p])"),
        ("eta not squared", "(eta**2 * (1 - a_p)", "(eta * (1 - a_p)"),
        ("variance for sigma", "(1 - a / a_p)).clamp(min=0).sqrt()", "(1 - a / a_p)).clamp(min=0)"),
        ("direction ignores sigma", "(1 - a_p - sigma**2).clamp", "(1 - a_p).clamp"),
        ("direction takes sigma, not its square", "(1 - a_p - sigma**2).clamp", "(1 - a_p - sigma).clamp"),
        ("v prediction with a wrong sign", '"v_prediction": (signal, -noise, noise, signal)',
         '"v_prediction": (signal, noise, noise, signal)'),
        ("sample prediction as epsilon's", '"sample": (zero, one, 1 / noise, -signal / noise)',
         '"sample": (zero, one, 1 / noise, -signal)'),
        ("always clipped", 'config = {"clip_sample": False, **config}', 'config = {"clip_sample": True, **config}'),
        ("never clipped", "if schedule.clip is not None:", "if False:"),
        ("noise added without its root", "(1 - a).sqrt() * noise\n", "(1 - a) * noise\n")),
    *of("sample.py", "test_sample.py",
        ("goes on from the best", "scores, pair.next", "scores, pair.winner"),
        ("goes on from the first", "scores, pair.next", "scores, x_p[0]"),
        ("winner and loser swapped in the pairs", "return pair.winner, pair.loser", "return pair.loser, pair.winner"),
        ("candidates scored at the next timestep", "score(x_p.flatten(0, 1), t.repeat(k)",
         "score(x_p.flatten(0, 1), (t - 50).clamp(min=0).repeat(k)"),
        ("prompts of the candidates in another order", "prompts.repeat(k)).view", "prompts.repeat_interleave(k)).view"),
        ("sampling without guidance", "guidance=guidance, noise=z, candidates=k)", "guidance=1.0, noise=z, candidates=k)"),
        ("pairs before the start", "if number < start:", "if False:"),
        ("stop is ignored", "draw.steps(stop)", "draw.steps(len(sched.timesteps))"),
        ("pairs start from the next latent", "steps.append(Pairs(x, ", "steps.append(Pairs(following, "),
        ("threshold of the first timestep everywhere", "pair_select(scores, x_p, gap, t,",
         "pair_select(scores, x_p, gap, 0 * t + sched.timesteps[0],"),
        ("the same noise at every step", "Counter(run, step, self.prompts)", "Counter(run, 0 * step, self.prompts)"),
        ("seed and epoch swapped", "[self.seed, self.epoch]", "[self.epoch, self.seed]")),
    *of("reward.py", "test_reward.py",
        ("mid feature without guidance", "[*flags, guided]", "[*flags, False]"),
        ("down features guided", "guided and self.multi_scale_cfg and i >= first_guided", "guided"),
        ("first stage of SDXL guided", "self.multi_scale_cfg and i >= first_guided", "self.multi_scale_cfg"),
        ("guidance below 1 is not off", ".float().clamp(min=1)", ".float()"),
        ("guidance schedule upside down", "np.interp(np.arange(TIMESTEPS), at, scale)",
         "np.interp(np.arange(TIMESTEPS), at, scale[::-1])"),
        ("mid feature first", "reward_pool([*down, mid], [*flags, guided]", "reward_pool([mid, *down], [guided, *flags]"),
        ("logit scale without exp", "self.logit_scale.exp() * (self", "self.logit_scale * (self"),
        ("features without unit length",
         "F.normalize(features if projection is None else projection(features), dim=-1, eps=0)",
         "features if projection is None else projection(features)"),
        ("text projection left out", "normalized(self.text_projection, text.pooled)",
         "normalized(None, text.pooled)[..., :12]"),
        ("no single precision under autocast", "with speed.autocast(\"no\"):", "if True:")),
    *of("kernels/reward_pool.py", "test_reward.py",
        ("text and null swapped in the feature", "feature = null + g * (feature - null)\n        features",
         "feature = feature + g * (null - feature)\n        features"),
        ("maximum for the mean", "text.mean((2, 3), dtype=dtype)", "text.amax((2, 3)).to(dtype)")),
    *of("kernels/pair_loss.py", "test_pair_loss.py",
        ("kernel: reference without guidance", "null_ref + guidance * (text_ref - null_ref)", "text_ref"),
        ("kernel: difference of rounded outputs", "(null - null_ref) + guidance * ((text - text_ref) - (null - null_ref))",
         "m - m_ref"),
        ("kernel: clip without effect on the difference", "tl.where(inside, mean_apart, sqrt",
         "tl.where(inside | True, mean_apart, sqrt"),
        ("kernel: channels-last read as NCHW", "place = element % HW * C + element // HW if LAST else element\n    null",
         "place = element\n    null"),
        ("kernel: text of another pair", "(n + pairs) * (C * HW) + place, mask=mask, other=0.0)",
         "(n + pairs - 1) * (C * HW) + place, mask=mask, other=0.0)"),
        ("kernel: block not masked", "tl.where(mask, w_ref * w_ref, 0.0)", "w_ref * w_ref"),
        ("kernel: finished before the last block", "== pairs * SPLITS - 1:", "== pairs * SPLITS - 2:"),
        ("kernel: padding counts", "other=0.0).to(tl.float64)\n            per",
         "other=0.0).to(tl.float64) * 0 + 1\n            per"),
        ("kernel: accuracy of the losers", "(win > lose).to(tl.float64)", "(win < lose).to(tl.float64)"),
        ("kernel: no clamp", "log_win, log_lose = _clipped(log_win, low, high), _clipped(log_lose, low, high)", "pass"),
        ("kernel: gradient of a clamped member", "tl.where((log_win > high) | (log_win < low), 0.0, slope)", "slope"),
        ("kernel: gradient through the clip", "tl.where((x0 > clip) | (x0 < -clip), direction * e_m, through)", "through"),
        ("kernel: null gradient of the text", "((1 - guidance) * grad)", "(guidance * grad)"),
        ("kernel: gradient of the loss ignored", "-tl.load(grad_ptr) * tl", "-tl"),
        ("kernel: NaN is clamped", "tl.where(x > high, high, tl.where(x < low, low, x))",
         "tl.where(x < high, tl.where(x > low, x, low), high)")),
    *of("backbone.py", "test_reward.py",
        ("maps after the down-sampler", "residuals[len(block.resnets) - 1]", "residuals[-1]"),
        ("null and text swapped in the batch", "return concatenate([null, self])", "return concatenate([self, null])"),
        ("last hidden state for SDXL", "out.hidden_states[-2]", "out.hidden_states[-1]"),
        ("SDXL's null is not zeros", "    if zero_null:\n", "    if False:\n")),
    *of("noise.py", "test_noise.py",
        ("nine rounds", "for _ in range(10):", "for _ in range(9):"),
        ("key is not advanced", "k0 + 0x9E3779B9 & _MASK", "k0"),
        ("epoch is ignored", "& _MASK, epoch & _MASK)", "& _MASK, 0)"),
        ("item is ignored", "items[None, :, None] & _MASK", "items[None, :, None] * 0"),
        ("candidates share noise", "(step << 16 | candidates)", "(step << 16 | candidates * 0)"),
        ("sine for both normals", "[radius * angle.cos(), radius * angle.sin()]",
         "[radius * angle.sin(), radius * angle.sin()]"),
        ("radius without the 2", "(-2 * torch.log(radius", "(-1 * torch.log(radius"),
        ("logarithm of 0", "torch.log(radius + 2.0**-24)", "torch.log(radius)"),
        ("orders repeat", ".argsort(stable=True)", " % n"),
        ("orders depend on no item", "torch.tensor([item]), ORDER", "torch.tensor([0]), ORDER"),
        ("integers reach high", "[0][0, :, 0] % high", "[0][0, :, 0] % (high + 1)")),
    *of("train_lpo.py", "test_loss.py",
        ("passes weigh alike, however full", "micro.valid / len(pairs.t)",
         "micro.valid / micro.valid.sum()"),
        ("padding is real", "._replace(valid=real)", "._replace(valid=real | True)"),
        ("gradients are not clipped", "shard.clip(parameters, config.max_grad_norm)",
         "shard.clip(parameters, 1e12)"),
        ("clip width ignored", "eps=config.clip_eps,\n                           guidance", "eps=1e9,\n"
         "                           guidance"),
        ("reference is the policy", "policy.train(*at), policy.reference(*at)",
         "policy.predict(*at), policy.predict(*at).detach()"),
        ("gradients add up over steps", "scaler.update()\n    optimizer.zero_grad(set_to_none=True)", "scaler.update()"),
        ("metrics of the last pass alone", "metrics = metrics + out.totals", "metrics = out.totals")),
    *of("train_lpo.py", "test_sample.py",
        ("pairs that are not valid train", "pairs.valid.nonzero()[:, 0]", "(pairs.valid | True).nonzero()[:, 0]"),
        ("pairs in the same order in all batches", "epoch, batch + 1, len(index)", "epoch, 1, len(index)"),
        ("prompts in the same order in all epochs", "(config.seed, epoch, 0, prompts)",
         "(config.seed, 0, 0, prompts)")),
    *of("train_lpo.py", "test_ranks.py",
        ("processes train on the same pairs", "rank + first * world, rank +", "0 * rank + first * world, 0 * rank +"),
        ("pooled pairs in the order of who made them", "kept.take((number * len(index) + place).argsort())", "kept")),
    *of("train_lpo.py", "test_lpo_run.py",
        ("a stopped batch is sampled anew", "at.pop(\"pairs\"),", "at.pop(\"pairs\") and None,")),
    *of("config.py", "test_train.py test_lpo_run.py test_official_loop.py",
        ("training without guidance", "return self.guidance_scale if self.train_cfg else 1.0", "return 1.0"),
        ("guidance in training always", "return self.guidance_scale if self.train_cfg else 1.0", "return self.guidance_scale")),
    *of("guard.py", "test_guard.py",
        ("a step of NaN is no event", "        self.state = {key: count + 1 for",
         "        return\n        self.state = {key: count + 1 for"),
        ("a scale grows in every precision", "init_scale=1.0, growth_interval=2**31 - 1", "init_scale=3.0"),
        ("the run never ends", "        if self.state[\"in_a_row\"] < IN_A_ROW:", "        if True:"),
        ("a collapse of the pairs passes", "recent < mean(self.first) / 5", "recent < 0")),
    *of("train_lpo.py", "test_guard.py",
        ("a pass that does not fit is left out",
         "        optimizer.zero_grad(set_to_none=True)\n        torch.cuda.empty_cache()\n",
         "        policy.pairs_at_once = 1\n        break\n"),
        ("half a step's gradients are counted twice", "        optimizer.zero_grad(set_to_none=True)\n        torch.cuda",
         "        torch.cuda")),
    *of("accounting.py", "test_accounting.py",
        ("recomputation is work", "        unet.disable_gradient_checkpointing()", "        pass"),
        ("gaps that overlap", "last = end if last is None else max(last, end)", "last = end")),
    *of("ranks.py", "test_ranks.py", ("gradients stay apart", "flat = total(torch.cat(", "flat = (torch.cat(")),
    *of("outputs.py", "test_official.py test_lpo_run.py",
        ("the optimizer's state is forgotten", "if (folder / OPTIMIZER).is_file():", "if False:"),
        ("a checkpoint's epoch is run again", "epoch_of(folder) + 1,", "epoch_of(folder),")),
    *of("official.py", "test_official.py",
        ("the constant threshold is ignored", "        low = high = of(", "        _ = of("),
        ("unknown keys pass", "        if key not in known:", "        if False:"),
        ("the launcher's precision is ignored", "os.environ.get(\"ACCELERATE_MIXED_PRECISION\", \"auto\")", "\"auto\"")),
    *of("kernels/group_norm_silu.py", "test_group_norm_silu.py",
        ("no epsilon", "(C // G * HW) + eps)", "(C // G * HW))"),
        ("always the same epsilon", "(C // G * HW) + eps)", "(C // G * HW) + 1e-5)"),
        ("shift is no part of the mean", "mean += tl.load(shift_ptr", "mean += 0 * tl.load(shift_ptr"),
        ("parts' means count as one", "+ rows * mean * mean", "+ 0 * rows * mean * mean"),
        ("rows of the last part", "tl.minimum(ROWS, HW - split * ROWS).to", "(ROWS + 0 * split).to"),
        ("Welford without the update", "square += n * (mean - whole[None, :]) * (mean - whole[None, :])", "pass"),
        ("gradient without the mean over the group", " - mean_1 - normalized * mean_2)", " - normalized * mean_2)"),
        ("gradient without the variance", " - mean_1 - normalized * mean_2)", " - mean_1)"),
        ("SiLU's gradient is its gate", "grad *= gate * (1 + u * (1 - gate))", "grad *= gate"),
        ("shift's gradient without the variance", " - mean_2[:, None] * sum_3)", ")")),
    *of("kernels/reward_pool.py", "test_reward_pool.py",
        ("guidance the wrong way", "c, CB, SB)\n        feature = null + g * (feature - null)",
         "c, CB, SB)\n        feature = feature + g * (null - feature)"),
        ("pixels of the padding count", "tl.sum(total, 1) / HW", "tl.sum(total, 1) / (HW + SB - 1)"),
        ("gradient of the null pass", "tl.where(null, 1 - g, g)", "tl.where(null, g, 1 - g)")),
    *of("kernels/pair_loss.py", "test_pair_loss.py",
        ("both branches get the text's share", "((1 - guidance) * grad).to(dtype)", "(guidance * grad).to(dtype)"),
        ("clamped members have a gradient", "tl.where((log_win > high) | (log_win < low), 0.0, slope)", "slope"),
        ("sums of the last block are lost", "real[:, None] & (split < SPLITS)[None, :]",
         "real[:, None] & (split < tl.maximum(SPLITS - 1, 1))[None, :]")),
    *of("kernels/ddim_candidates.py", "test_ddim_candidates.py",
        ("candidates share their noise", "b, k, tl.program_id(1) *", "b, k * 0, tl.program_id(1) *"),
        ("deviation left out", "mean + tl.load(at + 6) * z", "mean + z")),
    *of("kernels/pair_select.py", "test_pair_select.py",
        ("ties go to the last", "(score > high) | nan", "(score >= high) | nan"),
        ("a margin at the gap is enough", "high - low > tl.load(gap", "high - low >= tl.load(gap")),
    *of("surgery.py", "test_surgery.py",
        ("time embedding without SiLU", "self.time_emb_proj(self.nonlinearity(temb))", "self.time_emb_proj(temb)"),
        ("other blocks are fused too", "block.time_embedding_norm == \"default\"", "True")),
    *of("policy.py", "test_checkpoint.py",
        ("reference with the adapters on", "layer._disable_adapters = True", "layer._disable_adapters = False"),
        ("adapters stay off", "layer._disable_adapters = False", "pass")),
    *of("policy.py", "test_golden.py::test_golden[lpo_sd15_weights0]",
        ("reference is the trained model", "with adapters_off(self.adapters):", "if True:")),
    *of("files.py", "test_checkpoint.py test_run_state.py",
        ("pickles run code", "weights_only=True", "weights_only=False"),
        ("a failed write replaces the file", "        finally:\n            _remove(aside)",
         "        finally:\n            aside.exists() and os.replace(aside, target)"),
        ("a killed write loses the directory", "if old.exists() and not target.exists():", "if False:")),
    *of("files.py", "test_faults.py::test_the_kernel_refuses",
        ("torch's error hides the disk's", "error = error.__context__ or error", "pass")),
    *of("files.py", "test_faults.py::test_a_directory_is_removed_whole",
        ("a checkpoint is removed under its name", "os.replace(path, gone)\n        _remove(gone)", "_remove(path)")),
    *of("checkpoint.py", "test_faults.py::test_every_flipped_bit_of_a_state_is_found "
        "test_faults.py::test_a_damaged_state_gives_way_to_the_one_before "
        "test_faults.py::test_states_and_their_list_are_never_apart",
        ("states are not held against their list", "if sums and not what and", "if False and"),
        ("the state before is not kept", "with replacing(file, file.with_name(STATE_BEFORE)) as", "with replacing(file) as"),
        ("the list knows the newest state alone", "sums[:3]", "sums[:1]"),
        ("a damaged state becomes the one before", "os.replace(source, file)", "pass")),
    *of("outputs.py", "test_faults.py::test_resuming_from_an_older_checkpoint",
        ("damaged checkpoints are used", "what := files.damage(folder) or (", "what := (")),
    *of("runs.py", "test_faults.py::test_a_second_run_is_refused test_faults.py::test_a_half_written_row_is_dropped",
        ("workers inherit the lock", "fcntl.lockf(file", "fcntl.flock(file"),
        ("a part of a row stays", "file.truncate(file.read().rfind(b\"\\n\") + 1)", "file.read()")),
    *of("checkpoint.py", "test_checkpoint.py test_run_state.py",
        ("states of other parameters are read", "if {n: p.shape for n, p in self.parameters.items()} != ",
         "if False and "),
        ("weights are not restored", "parameter.data.copy_(shard.part(state[name], parameter))", "pass"),
        ("alpha of the file is ignored", "if config and name.endswith", "if False and name.endswith"),
        ("rslora is ignored", "(rank**0.5 if config.get(\"use_rslora\") else rank)", "rank"),
        ("alphas of modules are ignored", "config.get(\"alpha_pattern\") or {}", "{}"),
        ("alpha tensors are ignored", "(float(alpha) / tensors[up].shape[1])", "1"),
        ("alpha of the run is ignored", "scaled(state, 1 / scaling(unet))", "state"),
        ("alpha is not exported", "scaled(get_peft_model_state_dict(unet), scaling(unet))",
         "scaled(get_peft_model_state_dict(unet), 1)")),
    *of("data.py", "test_data.py",
        ("pictures lie on their side", "ImageOps.exif_transpose(picture)", "picture")),
    *of("pairs.py", "test_pairs.py",
        ("labels are not checked", "if (wrong := judged & ~good).any():", "if (wrong := judged & ~good).any() and False:"),
        ("the table's own counts are ignored", "    if not (good := (counts >= 1) & (counts < 2**31)).all():",
         "    counts = counts * 0 + 1\n    if False:"),
        ("a table of other pairs passes", "    if len(wrong):", "    if False:")),
    *of("score.py", "test_score.py",
        ("rows share their noise", "rows.to(self.device), timestep", "0 * rows.to(self.device), timestep"),
        ("pictures are scored at the size of the training alone", "(path, base, resolution=resolution)", "(path, base)")),
    *of("checkpoint.py", "test_score.py",
        ("the LRM's resolution is not recorded", "\"resolution\": lrm.resolution}", "\"resolution\": 0}")),
    *of("policy.py", "test_families.py",
        ("the LRM is told the size of its training", "resolution=size,", "resolution=config.resolution,")),
    *of("models.py", "test_families.py",
        ("the LRM's tokenizer is ignored", "    if config.lrm_tokenizer:\n", "    if False:\n")),
    *of("models.py", "test_models.py",
        ("an SDXL checkpoint in one file is taken for SD1.5", "if width == 2048", "if width == 0")),
    *of("files.py", "test_models.py",
        ("each process makes what is made once", "fcntl.flock(lock, fcntl.LOCK_EX)", "pass"),
        ("what killed processes left stays", "            _remove(left)", "            pass")),
    *of("sources.py", "test_pairs.py",
        ("splits are mixed", "return [file for file in files if splits[file] == split]", "return files"),
        ("a stray file is left out", "if stray := [file.name for file in files if not splits[file]]:", "if stray := []:"),
        ("a conversion is known by its time", "return about.st_size, about.st_mtime_ns, f.read()",
         "return (about.st_mtime_ns,)"),
        ("a conversion may lack rows", "if len(dataset) != (rows", "if 0 and len(dataset) != (rows")),
    *of("preflight.py", "test_preflight.py",
        ("training pairs are held out without a word", "if use != \"train\" and used[use]", "if False and used[use]"),
        ("models are converted before pairs are read", "    used = training_pairs(config)\n",
         "    models.model(config)\n    used = training_pairs(config)\n")),
    *of("latents.py", "test_latents.py::test_damaged_entries_are_made_anew",
        ("damaged entries are used", " and zlib.crc32(entry) + 1 == mark", ""),
        ("damaged entries stay", "new = (~(batch[\"cached\"] |", "new = (~(batch[\"cached\"] | True |")),
    *of("latents.py", "test_latents.py::test_what_a_cache_is_of test_latents.py::test_refused_before_the_run",
        ("a cache of another VAE", "digest(backbone.vae_folder(path)), ", "\"\", "),
        ("a cache of another table", "pairs.source.fingerprint()", "\"\""),
        ("room for the marks is forgotten", "n * (cache.size + MARK)", "n * cache.size")),
    *of("train_lrm.py", "test_latents.py::test_damaged_entries_are_made_anew",
        ("what is cached is encoded again, from nothing", "torch.where(cached, moments, made)", "made")),
    *of("train_lrm.py", "test_latents.py::test_parts_give_what_the_whole_gives test_latents.py::test_part_size",
        ("variance for deviation", "(0.5 * log_variance", "(1.0 * log_variance"),
        ("all pictures at once", "-(-count * side**2 // ENCODED)", "1")),
    *of("train_lrm.py", "test_settings.py::test_lrm",
        ("a frozen text encoder trains", "lrm.text_encoders.requires_grad_(not config.freeze_text_encoder)", "pass"),
        ("the logit scale is the recipe's", "lrm.logit_scale.data.fill_(config.logit_scale)", "pass"),
        ("no noise offset", "config.noise_offset, config.compile)", "0.0, config.compile)"),
        ("no picture is mirrored", "flips(config, step, rows) if config.hflip else None", "None"),
        ("weight decay is torch's", "weight_decay=config.weight_decay)", "weight_decay=0.01)"),
        ("always the model's own VAE", "models.vae(config),\n", "None,\n"),
        ("the LRM's gradients are not clipped", "if p.requires_grad], config.max_grad_norm)", "if p.requires_grad], 1e9)")),
    *of("train_lrm.py", "test_lrm_data.py::test_checkpoints test_lrm_data.py::test_no_validation_pair_decodes "
        "test_lrm_data.py::test_the_handed_on_model_is_the_one_that_is_judged",
        ("the last weights are judged", "            restore(lrm, out / FINAL)\n", "            pass\n"),
        ("checkpoints pile up", "        if folder.name not in kept:", "        if False:"),
        ("a worse checkpoint is saved", "if config.save_only_if_best and any(accuracy < known", "if any(accuracy < known - 9"),
        ("no pair decodes, and nobody says so", "if corrupt is not None and not count:", "if False:")),
    *of("train_lrm.py", "test_ranks.py::test_no_process_leaves_before_the_state_is_written",
        ("processes leave too early", "        ranks.wait()  # a launcher", "        # a launcher")),
    *of("train_lpo.py", "test_settings.py::test_lpo",
        ("betas swapped", "betas=(config.adam_beta1, config.adam_beta2)", "betas=(config.adam_beta2, config.adam_beta1)"),
        ("no weight decay", "weight_decay=config.weight_decay,", "weight_decay=0.0,")),
    *of("train_lpo.py", "test_lpo_run.py::test_the_average_that_is_exported",
        ("the average is not exported", "        ema.copy_to(trainable(policy.unet))", "        pass")),
    *of("train_lpo.py", "test_ranks.py::test_another_number_of_processes_goes_on_with_the_next_prompts",
        ("prompts are counted in batches", "len(prompts), at[\"prompts\"])[0]",
         "len(prompts), at[\"batch\"] * config.batch_size * ranks.count())[0]")),
    *of("policy.py", "test_settings.py",
        ("the reward model's guidance is its own", "config.lrm_guidance or None", "None"),
        ("its down features' guidance is its own", "\"multi_scale_cfg\": config.lrm_multi_scale_cfg}",
         "\"multi_scale_cfg\": None}"),
        ("its resolution is its own", "resolution=size,  # of the", "resolution=0,  # of the"),
        ("eta is 1", "config.num_steps, config.eta)", "config.num_steps, 1.0)")),
    *of("outputs.py", "test_lpo_run.py::test_a_run_from_a_checkpoint_has_settings_of_its_own",
        ("the checkpoint's rate holds", "            group.update(settings)", "            pass")),
    *of("ranks.py", "test_ranks.py::test_parameters_that_no_loss_reaches",
        ("parameters without a gradient decay", "strict=True) if times):", "strict=True)):")),
    *of("evaluate.py", "test_evaluate.py::test_scores_are_keyed_by_the_picture_s_number "
        "test_evaluate.py::test_the_whole_command",
        ("processes share the noise of scores", "reward(files, texts, rows=items)", "reward(files, texts)"),
        ("the base is the tuned model", "if side == \"tuned\" and settings.lora else", "if settings.lora else"),
        ("scores for another prompt", "texts = [prompts[i // settings.pictures_per_prompt]",
         "texts = [prompts[i % len(prompts)]")),
    *of("export.py", "test_export.py",
        ("the LoRA is taken away", "        weight += (b", "        weight -= (b"),
        ("a LoRA of another model fits", "if weight is None or weight.shape != (len(b), *a.shape[1:]):", "if weight is None:"),
        ("always saved in fp32", "unet.to(DTYPES[dtype]).save_pretrained", "unet.save_pretrained")),
    *of("scorers.py", "test_scorers.py",
        ("beauty of an embedding of any length",
         "F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)",
         "model.visual_projection(model.vision_model(pixels).pooler_output)"),
        ("PickScore without its scale", "clip(\"pickscore\")[0].logit_scale.exp() * cosines", "1.0 * cosines"),
        ("scores that are not finite pass", " or not values.isfinite().all()", "")),
    *of("score_table.py", "test_score_table.py",
        ("gaps of the first picture, preferred or not", "sign * (first - second))", "first - second)"),
        ("ties have signed gaps", "np.abs(first - second)", "first - second"),
        ("a stopped table begins again", "scored(config, table, scorers, first or 0)", "scored(config, table, scorers, 0)")),
    *of("data.py", "test_pairs.py", ("the filter keeps its bound", "(clip > 0)", "(clip >= 0)")),
    *of("files.py", "test_bad_data.py::test_a_compressed_checkpoint_and_a_tensor_larger_than_its_file",
        ("compressed checkpoints are unpacked", "if sum(member.file_size for member in members.infolist()) >", "if 1e99 <"),
        ("a tensor may be larger than its file", " or leaf.nbytes > leaf.untyped_storage().nbytes()", "")),
    *of("files.py", "test_bad_data.py::test_configs_that_are_refused",
        ("of a key twice the last counts", "if name in found:", "if False:"),
        ("YAML's aliases are followed", "if any(isinstance(token, yaml.AliasToken)", "if False and any(True")),
    *of("data.py", "test_bad_data.py::test_postscript_is_no_picture test_bad_data.py::test_bombs_take_no_memory",
        ("pictures of every kind are opened", ", formats=FORMATS)", ")"),
        ("huge pictures are decoded", "if picture.width * picture.height > LARGEST_PICTURE:", "if False:")),
    *of("data.py", "test_bad_data.py::test_columns_are_counted_and_come_as_they_are",
        ("a table's values take no memory of their own", "len(schema) * A_VALUE", "0"),
        ("values by number are counted once", "if pa.types.is_dictionary(column.type) and isinstance(", "if False and (")),
    *of("files.py", "test_bad_data.py::test_the_net_is_taken_away",
        ("a table may take all memory", "(most if limits[0] < 0 else min(most, limits[0]), limits[1])", "limits"),
        ("the net stays", "        resource.setrlimit(resource.RLIMIT_AS, limits)\n", "        pass\n")),
    *of("models.py", "test_hostile.py::test_libraries_of_a_model_index_are_not_imported",
        ("a model index names what is imported", "        check_index(configs, flag)\n", "        pass\n")),
    *of("backbone.py", "test_hostile.py::test_attention_of_a_config_is_not_fetched",
        ("a config chooses its attention", '"attn_implementation": "sdpa"}', "}")),
    *of("config.py", "test_hostile.py::test_a_run_stays_in_its_directory",
        ("a run's name may be a path", "and not any(sign in name for sign in", "and any(True for sign in")),
    *of("compare.py", "test_hostile.py::test_no_element_or_attribute_of_a_page_comes_from_a_prompt",
        ("prompts are markup", "<figcaption>{escape(row[\"prompt\"])}", "<figcaption>{row[\"prompt\"]}")),
    *of("runs.py", "test_hostile.py",
        ("tokens are recorded", "        if SECRET.search(name) and len(value) >= 8:", "        if False:")),
]


def preload() -> None:
    """Import once what the tests import, so that the processes below need not; not lpo_fast itself."""
    import torch
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    for name in ("pytest", "hypothesis", "pyarrow.parquet", "peft", "diffusers.training_utils",
                 "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"):
        importlib.import_module(name)


def child(copy: Path, tests: tuple[str, ...], code: Synchronized) -> None:
    """In a process of its own: run the tests on the copy, quietly."""
    import pytest
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True  # a mutation of the same length within the same second would go unseen
    code.value = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)])
    if Path(sys.modules["lpo_fast"].__file__).resolve().parent.parent != copy:
        code.value = ANOTHER


def run(copy: Path, tests: tuple[str, ...]) -> int:
    """pytest's exit code in the copy."""
    context = multiprocessing.get_context("fork")
    code = context.Value("i", HUNG)
    process = context.Process(target=child, args=(copy, tests, code))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
    return code.value


def main(names: list[str]) -> int:
    """Try the mutations, all or those named; the exit code."""
    chosen = [m for m in MUTATIONS if not names or any(name in m.name for name in names)]
    bad = [m.name for m in chosen if (ROOT / "lpo_fast" / m.file).read_text(encoding="utf-8").count(m.old) != 1]
    for name in bad:
        print(f"NOT FOUND ONCE  {name}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for part in ("lpo_fast", "kernels", "tests"):
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(ROOT / "pyproject.toml", copy / "pyproject.toml")
        preload()
        for tests in sorted({m.tests for m in chosen}):
            if code := run(copy, tests):
                print(f"{' '.join(tests)} fails without a mutation: code {code} ({ANOTHER}: another copy was imported)")
                return 1
        survived = 0
        for mutation in chosen:
            file = copy / "lpo_fast" / mutation.file
            source = file.read_text(encoding="utf-8")
            if mutation.name in bad:
                continue
            file.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
            alive = run(copy, mutation.tests) not in (FAILED, HUNG)
            file.write_text(source, encoding="utf-8")
            survived += alive
            print(f"{'SURVIVED' if alive else 'killed'}  {mutation.file}: {mutation.name}", flush=True)
    print(f"{len(chosen) - survived - len(bad)} killed, {survived} survived, {len(bad)} not found once")
    return 1 if survived or bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
