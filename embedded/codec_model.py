"""The toy codec: the package's own 12 Hz classes at small widths, and what they lack for training.

The package's classes only infer: weights are not initialised for training, and there is neither a straight-through
quantizer nor any way to fit its codebooks. ``TrainableCodec`` has both, and exports what stock qwen-tts loads.

Only the first NUM_LEVELS of the 16 codebooks carry anything, and of each only the first NUM_CODES of 2048 codewords.
The other codebooks always give code 0, which stands for a zero vector: at this size the later levels only refine noise
(STOI 0.789 with 4 levels, 0.791 with 16), and a sub-talker of 100,000 weights learns a constant at once.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from finetuning.codec import CODEBOOK_SIZE, NUM_CODEBOOKS
from finetuning.disk import new_folder
from finetuning.stock import import_qwen_tts

SAMPLE_RATE_HZ = 24_000
SAMPLES_PER_FRAME = 1920
CODE_WIDTH = 32
NUM_LEVELS = 6
NUM_CODES = 512
#: Norm of the codewords that are never to be chosen, as a multiple of the largest that is used: further away than any
#: latent.
_UNUSED_NORM = 4.0
#: What the heads predict of a frame (``codec_losses.LatentTargets``).
TWIN_WIDTH, FINE_WIDTH, HARMONIC_WIDTH = 160, 320, 200


def codec_config() -> dict[str, Any]:
    """Settings of ``Qwen3TTSTokenizerV2Config``: 1.0 M weights in the encoder, 2.8 M in the decoder.

    The real decoder has four blocks (x 8, 5, 4, 3). Five smaller steps do the same work in a third of the time per
    channel, since few of it is done at high rates, and have room for half as many channels again.
    """
    width = 128
    attention = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": width // 4}
    encoder = {
        **attention, "hidden_size": width, "num_filters": 16, "num_hidden_layers": 1, "intermediate_size": 2 * width,
        "codebook_size": CODEBOOK_SIZE, "codebook_dim": CODE_WIDTH, "vector_quantization_hidden_dimension": CODE_WIDTH,
        "num_quantizers": NUM_CODEBOOKS, "upsampling_ratios": [8, 6, 5, 4], "sampling_rate": SAMPLE_RATE_HZ,
        "_frame_rate": 12.5, "use_causal_conv": True, "upsample_groups": width, "sliding_window": 24,
        "pad_mode": "constant", "layer_scale_initial_scale": 0.1,
    }  # fmt: skip
    decoder = {
        **attention, "latent_dim": 128, "codebook_dim": 2 * CODE_WIDTH, "codebook_size": CODEBOOK_SIZE,
        "decoder_dim": 384, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2,
        "num_quantizers": NUM_CODEBOOKS, "num_semantic_quantizers": 1, "sliding_window": 12,
        "upsample_rates": [2, 3, 4, 4, 5], "upsampling_ratios": [2, 2], "layer_scale_initial_scale": 0.1,
    }  # fmt: skip
    return {"encoder_config": encoder, "decoder_config": decoder}


def build_codec(seed: int = 0) -> Any:
    """A ``Qwen3TTSTokenizerV2Model`` whose weights are initialised for training."""
    import_qwen_tts()
    from qwen_tts.core import Qwen3TTSTokenizerV2Config, Qwen3TTSTokenizerV2Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3TTSTokenizerV2Model(Qwen3TTSTokenizerV2Config(**codec_config()))
        for module in model.modules():
            _initialize(module)
        _initialize_encoder(model.encoder)
        _initialize_decoder(model)
    return model


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, nn.Linear)):
        if isinstance(module, nn.Linear) or module.kernel_size[0] == 1:
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(getattr(module, "gamma", None), nn.Parameter):
        nn.init.constant_(module.gamma, 0.1)


def _initialize_encoder(encoder: Any) -> None:
    """Unit-scale activations, so that the ELUs rectify: with small ones it stays a linear filter and learns nothing."""
    convolutions = [module for module in encoder.encoder.modules() if isinstance(module, nn.Conv1d)]
    for number, layer in enumerate(convolutions):
        gain = 1.2 if number else 20.0  # speech has a root mean square of 0.08
        nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_channels * layer.kernel_size[0]))
    down = encoder.downsample.conv
    nn.init.normal_(down.weight, std=1 / math.sqrt(down.in_channels * 4))
    for quantizer in _encoder_quantizers(encoder):
        nn.init.normal_(quantizer.input_proj.weight, std=0.5 / math.sqrt(quantizer.input_proj.in_channels))


def _initialize_decoder(model: Any) -> None:
    """Residual units start small; of a transposed convolution each output sees kernel / stride taps of its inputs."""
    for block in model.decoder.decoder[1:-2]:
        for unit in block.block[2:]:
            unit.conv2.conv.weight.data.mul_(0.3)
    for module in model.modules():
        if isinstance(module, nn.ConvTranspose1d):
            taps = module.kernel_size[0] / module.stride[0]
            bound = math.sqrt(1 / (taps * module.in_channels))
            nn.init.uniform_(module.weight, -bound, bound)


def _encoder_quantizers(encoder: Any) -> tuple[Any, Any]:
    quantizer = encoder.quantizer
    return quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer


# ---------------------------------------------------------------------------------------------------- quantizing


class ResidualQuantizer(nn.Module):
    """Codebooks that are fitted: by k-means, then by moving averages. One per branch, for encoder and decoder both.

    Attributes:
        codebooks: (num_levels, NUM_CODES, CODE_WIDTH).
        usage, sums: their moving averages; a usage of 1 is the mean.
    """

    codebooks: torch.Tensor
    usage: torch.Tensor
    sums: torch.Tensor

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        shape = (num_levels, NUM_CODES, CODE_WIDTH)
        self.register_buffer("codebooks", torch.zeros(shape))
        self.register_buffer("usage", torch.ones(shape[:2]))
        self.register_buffer("sums", torch.zeros(shape))

    def nearest(self, residual: torch.Tensor, level: int) -> torch.Tensor:
        """(N, CODE_WIDTH) to the (N,) codes of a level."""
        codebook = self.codebooks[level]
        return torch.addmm((codebook**2).sum(1)[None], residual, codebook.t(), alpha=-2).argmin(1)

    @torch.no_grad()
    def fit(self, latents: torch.Tensor, num_rounds: int, draw: torch.Generator) -> float:
        """K-means of every level on what the levels before it leave of (N, CODE_WIDTH) latents.

        Returns:
            The share of the variance that is left at the end.
        """
        residual = latents.clone()
        for level in range(len(self.codebooks)):
            self.codebooks[level] = residual[_chosen(len(residual), NUM_CODES, draw)]
            for _ in range(num_rounds):
                self._move_to_means(residual, level, draw)
            codes = self.nearest(residual, level)
            count = torch.bincount(codes, minlength=NUM_CODES).float().clamp(min=0.1)
            self.usage[level] = count / count.mean()
            self.sums[level] = self.codebooks[level] * self.usage[level][:, None]
            residual = residual - self.codebooks[level][codes]
        return float((residual**2).mean() / latents.var(0).mean())

    def _move_to_means(self, residual: torch.Tensor, level: int, draw: torch.Generator) -> None:
        codes = self.nearest(residual, level)
        count = torch.bincount(codes, minlength=NUM_CODES).float()
        sums = torch.zeros_like(self.codebooks[level]).index_add_(0, codes, residual)
        is_used = count > 0
        self.codebooks[level][is_used] = sums[is_used] / count[is_used][:, None]
        unused = (~is_used).nonzero()[:, 0]
        if len(unused):
            self.codebooks[level][unused] = residual[_chosen(len(residual), len(unused), draw)]

    def forward(self, latents: torch.Tensor, momentum: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantizes with the gradient passed straight through.

        Args:
            latents: (batch, frames, CODE_WIDTH).
            momentum: of the codebooks' moving averages; 0 leaves the codebooks alone.

        Returns:
            The quantized latents, and the mean square distance to them.
        """
        residual = latents.detach().reshape(-1, CODE_WIDTH)
        quantized = torch.zeros_like(residual)
        for level in range(len(self.codebooks)):
            codes = self.nearest(residual, level)
            chosen = self.codebooks[level][codes]
            if momentum:
                self._follow(residual, codes, level, momentum)
            residual, quantized = residual - chosen, quantized + chosen
        quantized = quantized.view_as(latents)
        return latents + (quantized - latents).detach(), F.mse_loss(latents, quantized)

    @torch.no_grad()
    def codes(self, latents: torch.Tensor) -> torch.Tensor:
        """(batch, frames, CODE_WIDTH) to (batch, frames, num_levels) codes."""
        residual, found = latents.reshape(-1, CODE_WIDTH), []
        for level, codebook in enumerate(self.codebooks):
            found.append(self.nearest(residual, level))
            residual = residual - codebook[found[-1]]
        return torch.stack(found, dim=-1).view(*latents.shape[:2], -1)

    def vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """(batch, frames, num_levels) codes to (batch, frames, CODE_WIDTH), the sums of their codewords."""
        return sum(codebook[codes[..., level]] for level, codebook in enumerate(self.codebooks))

    @torch.no_grad()
    def _follow(self, residual: torch.Tensor, codes: torch.Tensor, level: int, momentum: float) -> None:
        share = (1 - momentum) * NUM_CODES / len(codes)
        count = torch.bincount(codes, minlength=NUM_CODES).float()
        sums = torch.zeros_like(self.sums[level]).index_add_(0, codes, residual)
        self.usage[level].mul_(momentum).add_(count, alpha=share)
        self.sums[level].mul_(momentum).add_(sums, alpha=share)
        self.codebooks[level] = self.sums[level] / self.usage[level].clamp(min=1e-3)[:, None]


def _chosen(num: int, num_wanted: int, draw: torch.Generator) -> torch.Tensor:
    """Indices below ``num``; each at most once where there are enough."""
    if num >= num_wanted:
        return torch.randperm(num, generator=draw)[:num_wanted]
    return torch.randint(num, (num_wanted,), generator=draw)


# ------------------------------------------------------------------------------------------------------ training


class TrainableCodec(nn.Module):
    """The package's model with differentiable paths through it, and heads that training uses and the export drops.

    The heads make the latents say what they should hold: without them the encoder does not learn. ``twin_head`` hears
    the semantic branch alone and predicts the clip's neutral twin, so that codebook 0 says what is spoken and not by
    whom; the others hear both branches and predict the clip. ``harmonic_head`` predicts the spectrum below 1.2 kHz
    finely enough to tell a voice's harmonics apart, and ``pitch_head`` log2(f0 / 150 Hz).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.semantic = ResidualQuantizer(1)
        self.acoustic = ResidualQuantizer(NUM_LEVELS - 1)
        self.twin_head = _head(CODE_WIDTH, TWIN_WIDTH)
        self.fine_head = _head(2 * CODE_WIDTH, FINE_WIDTH)
        self.harmonic_head = _head(2 * CODE_WIDTH, HARMONIC_WIDTH)
        self.pitch_head = nn.Linear(2 * CODE_WIDTH, 1)

    def latents(self, waveforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, frames * 1920) to the two branches before quantizing, each (batch, frames, CODE_WIDTH)."""
        encoder = self.model.encoder
        hidden = encoder.encoder(waveforms[:, None])
        hidden = encoder.encoder_transformer(hidden.transpose(1, 2), return_dict=True)[0].transpose(1, 2)
        hidden = encoder.downsample(hidden)
        semantic, acoustic = (branch.input_proj(hidden).transpose(1, 2) for branch in _encoder_quantizers(encoder))
        return semantic, acoustic

    def decode(self, semantic: torch.Tensor, acoustic: torch.Tensor) -> torch.Tensor:
        """Latents, quantized or not, to (batch, frames * 1920) waveforms."""
        decoder = self.model.decoder
        hidden = decoder.quantizer.rvq_first.output_proj(semantic.transpose(1, 2))
        hidden = hidden + decoder.quantizer.rvq_rest.output_proj(acoustic.transpose(1, 2))
        hidden = decoder.pre_conv(hidden).transpose(1, 2)
        hidden = decoder.pre_transformer(inputs_embeds=hidden).last_hidden_state.permute(0, 2, 1)
        for layer in (layer for block in decoder.upsample for layer in block):
            hidden = layer(hidden)
        for block in decoder.decoder:
            hidden = block(hidden)
        return hidden[:, 0]

    def codes(self, waveforms: torch.Tensor) -> torch.Tensor:
        """(batch, frames * 1920) to (batch, frames, NUM_LEVELS) codes."""
        semantic, acoustic = self.latents(waveforms)
        return torch.cat([self.semantic.codes(semantic), self.acoustic.codes(acoustic)], dim=-1)

    def quantized(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, frames, NUM_LEVELS) codes to the two branches that ``decode`` takes."""
        return self.semantic.vectors(codes[..., :1]), self.acoustic.vectors(codes[..., 1:])

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Those of the encoder that the codes depend on, and of the heads."""
        parts = ("model.encoder.", "twin_head", "fine_head", "harmonic_head", "pitch_head")
        return [value for name, value in self.named_parameters() if name.startswith(parts) and not _is_unused(name)]

    def decoder_parameters(self) -> list[nn.Parameter]:
        """Those of the decoder, its codebooks left out."""
        return [
            value
            for name, value in self.named_parameters()
            if name.startswith("model.decoder.") and not _is_unused(name)
        ]

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Writes the codec as fp16 safetensors that ``Qwen3TTSTokenizer.from_pretrained`` loads."""
        from transformers import EncodecFeatureExtractor

        model = copy.deepcopy(self.model).cpu()
        codebooks = torch.cat([self.semantic.codebooks, self.acoustic.codebooks]).cpu()
        far = _far_codewords(_UNUSED_NORM * float(codebooks.norm(dim=2).max()))
        constant = torch.cat([torch.zeros(1, CODE_WIDTH), far[1:]])
        for level in range(NUM_CODEBOOKS):
            used = torch.cat([codebooks[level], far[NUM_CODES:]]) if level < NUM_LEVELS else constant
            _put_codebook(model, level, used)
        with new_folder(folder) as unfinished:
            model.half().save_pretrained(unfinished)
            extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=SAMPLE_RATE_HZ, padding_value=0.0)
            extractor.save_pretrained(unfinished)


def _is_unused(name: str) -> bool:
    """Whether a parameter has its part only in the package's own paths, which nothing differentiates."""
    return any(part in name for part in ("codebook", "residual_vector_quantizer.output"))


def _head(width: int, width_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width_out))


def _far_codewords(norm: float) -> torch.Tensor:
    """(CODEBOOK_SIZE, CODE_WIDTH) too far away to be chosen."""
    codebook = torch.randn(CODEBOOK_SIZE, CODE_WIDTH, generator=torch.Generator().manual_seed(0))
    return codebook / codebook.norm(dim=1, keepdim=True) * norm


def _put_codebook(model: Any, level: int, codebook: torch.Tensor) -> None:
    """The same codewords on the encoder's and the decoder's side."""
    branch, place = (0, 0) if level == 0 else (1, level - 1)
    encoder_side = _encoder_quantizers(model.encoder)[branch].layers[place].codebook
    encoder_side.embed_sum.copy_(codebook)
    encoder_side.cluster_usage.fill_(1.0)
    encoder_side._embed = None
    quantizer = model.decoder.quantizer
    decoder_side = (quantizer.rvq_first, quantizer.rvq_rest)[branch].vq.layers[place]._codebook
    decoder_side.embedding_sum.data.copy_(codebook)
    decoder_side.cluster_usage.data.fill_(1.0)
