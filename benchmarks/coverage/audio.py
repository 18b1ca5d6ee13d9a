"""Audio of transformers."""

from __future__ import annotations

import torch

from benchmarks.coverage.given import floats, given, zeros
from benchmarks.coverage.inputs import tokens
from benchmarks.coverage.transformers_row import BOTH, Row

CONV = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
}

ROWS = (
    Row(
        "audio_spectrogram_transformer",
        "ASTModel",
        2,
        {"max_length": 64, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
        given(input_values=floats(64, 16)),
    ),
    Row(
        "bark_causal",
        "BarkCausalModel",
        2,
        {"input_vocab_size": 128, "output_vocab_size": 128, "hidden_size": 64, "block_size": 128},
    ),
    Row(
        "clap_audio",
        "ClapAudioModel",
        2,
        {
            "spec_size": 64,
            "patch_embeds_hidden_size": 16,
            "num_mel_bins": 16,
            "window_size": 2,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "num_hidden_layers": 2,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "hidden_size": 32,
        },
        given(input_features=floats(1, 64, 16), is_longer=zeros(1, dtype=torch.bool)),
    ),
    Row("clap_text", "ClapTextModel", 2),
    Row("data2vec_audio", "Data2VecAudioModel", 2),
    Row("glmasr_encoder", "GlmAsrEncoder", 2),
    Row("hubert", "HubertModel", 2, CONV, spellings=BOTH),
    Row("lasr_ctc", "LasrForCTC", 2, inputs=given(input_features=floats(64, 16))),
    Row("lasr_encoder", "LasrEncoder", 2, {"num_mel_bins": 16}, given(input_features=floats(64, 16))),
    Row(
        "mimi",
        "MimiModel",
        4,
        {
            "num_filters": 8,
            "hidden_size": 64,
            "codebook_dim": 32,
            "vector_quantization_hidden_dimension": 32,
            "upsample_groups": 32,
            "head_dim": 16,
            "num_key_value_heads": 4,
        },
        given(input_values=floats(1, 1920 * 4)),
    ),
    Row(
        "moonshine",
        "MoonshineModel",
        6,
        {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
        given(input_values=floats(8000), decoder_input_ids=lambda s: tokens(s, 16), use_cache=False),
    ),
    Row(
        "musicgen_decoder",
        "MusicgenForCausalLM",
        2,
        {"num_codebooks": 2},
        lambda m, s: {"input_ids": torch.randint(5, 100, (s.batch * 2, s.seq)), "use_cache": False},
    ),
    Row(
        "parakeet_encoder",
        "ParakeetEncoder",
        2,
        {"num_mel_bins": 16, "subsampling_conv_channels": 16},
        given(input_features=floats(64, 16)),
    ),
    Row("sew", "SEWModel", 2, {**CONV, "squeeze_factor": 2}),
    Row("sew_d", "SEWDModel", 2, {**CONV, "squeeze_factor": 2}),
    Row(
        "speech_to_text",
        "Speech2TextModel",
        6,
        {"input_feat_per_channel": 16, "conv_channels": 32},
        given(input_features=floats(128, 16), decoder_input_ids=lambda s: tokens(s, 16), use_cache=False),
    ),
    Row(
        "speecht5",
        "SpeechT5Model",
        6,
        {"num_mel_bins": 16, "encoder_max_relative_position": 16},
        given(input_values=floats(64, 64), decoder_input_values=floats(16, 64), use_cache=False),
    ),
    Row("unispeech", "UniSpeechModel", 2, CONV),
    Row("unispeech_sat", "UniSpeechSatModel", 2),
    Row("voxtral_realtime_encoder", "VoxtralRealtimeEncoder", 2),
    Row("wav2vec2", "Wav2Vec2Model", 2, CONV, spellings=BOTH),
    Row(
        "wav2vec2_bert",
        "Wav2Vec2BertModel",
        2,
        {"feature_projection_input_dim": 16},
        given(input_features=floats(64, 16)),
    ),
    Row("wav2vec2_conformer", "Wav2Vec2ConformerModel", 2, CONV),
    Row("wavlm", "WavLMModel", 2, CONV),
    Row(
        "whisper",
        "WhisperModel",
        6,
        {"max_source_positions": 32},
        given(input_features=floats(16, 64), decoder_input_ids=lambda s: tokens(s, 16), use_cache=False),
        spellings=BOTH,
    ),
)
