"""Time series, decisions and general inputs of transformers."""

from __future__ import annotations

import torch

from benchmarks.coverage.given import floats, given, ones, zeros
from benchmarks.coverage.transformers_row import Row

FORECAST = {
    "prediction_length": 8,
    "context_length": 24,
    "input_size": 1,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
}
SERIES = given(
    past_values=floats(26),
    past_time_features=floats(26, 1),
    past_observed_mask=ones(26),
    future_values=floats(8),
    future_time_features=floats(8, 1),
)

ROWS = (
    Row("autoformer", "AutoformerModel", 0, FORECAST, SERIES),
    Row(
        "decision_transformer",
        "DecisionTransformerModel",
        2,
        {"state_dim": 4, "act_dim": 2},
        given(
            states=floats(20, 4),
            actions=floats(20, 2),
            rewards=floats(20, 1),
            returns_to_go=floats(20, 1),
            timesteps=lambda s: torch.arange(20)[None].expand(s.batch, -1),
            attention_mask=lambda s: torch.ones(s.batch, 20, dtype=torch.long),
        ),
    ),
    Row("informer", "InformerModel", 6, FORECAST, SERIES),
    Row(
        "patchtsmixer",
        "PatchTSMixerModel",
        0,
        {"context_length": 64, "patch_length": 8, "num_input_channels": 2, "gated_attn": True},
        given(past_values=floats(64, 2)),
        negative=True,
    ),
    Row(
        "patchtst",
        "PatchTSTModel",
        2,
        {"num_input_channels": 2, "context_length": 64, "patch_length": 4, "patch_stride": 4},
        given(past_values=floats(64, 2)),
    ),
    Row(
        "perceiver",
        "PerceiverModel",
        5,
        {
            "d_latents": 64,
            "num_latents": 8,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
        given(inputs=floats(64, 64)),
    ),
    Row("time_series_transformer", "TimeSeriesTransformerModel", 6, FORECAST, SERIES),
    Row(
        "timesfm",
        "TimesFmModel",
        2,
        {"context_length": 64, "patch_length": 16},
        given(past_values=floats(64), past_values_padding=zeros(64), freq=zeros(1, dtype=torch.long)),
    ),
    Row("timesfm2_5", "TimesFm2_5Model", 2),
)
