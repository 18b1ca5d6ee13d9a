"""Encoder-decoders of transformers."""

from __future__ import annotations

from benchmarks.coverage.transformers_row import BOTH, PAD, Row

ROWS = (
    Row("bart", "BartModel", 6, spellings=BOTH, variants=PAD),
    Row("bigbird_pegasus", "BigBirdPegasusModel", 6),
    Row("blenderbot", "BlenderbotModel", 6, spellings=BOTH),
    Row("blenderbot_small", "BlenderbotSmallModel", 6),
    Row("fastspeech2_conformer", "FastSpeech2ConformerModel", 4),
    Row("fsmt", "FSMTModel", 6, {"langs": ["en", "de"]}),
    Row("led", "LEDModel", 6, variants=PAD),
    Row("longt5", "LongT5Model", 6),
    Row("m2m_100", "M2M100Model", 6, spellings=BOTH, variants=PAD),
    Row("marian", "MarianModel", 6, spellings=BOTH),
    Row("mbart", "MBartModel", 6, spellings=BOTH, variants=PAD),
    Row("mt5", "MT5Model", 6, spellings=BOTH),
    Row("mvp", "MvpModel", 6),
    Row("nllb_moe", "NllbMoeModel", 6),
    Row("pegasus", "PegasusModel", 6, spellings=BOTH, variants=PAD),
    Row("pegasus_x", "PegasusXModel", 8),
    Row("plbart", "PLBartModel", 6),
    Row("prophetnet", "ProphetNetModel", 8, {"num_buckets": 8}),
    Row("seamless_m4t_text", "SeamlessM4TForTextToText", 6, {"speech_encoder_layers": 1}),
    Row("switch_transformers", "SwitchTransformersModel", 6),
    Row("t5", "T5Model", 6, spellings=BOTH, variants=PAD),
    Row("t5gemma", "T5GemmaModel", 6),
    Row("umt5", "UMT5Model", 6, spellings=BOTH, variants=PAD),
    Row("umt5_encoder", "UMT5EncoderModel", 2, {"relative_attention_num_buckets": 8}),
)
