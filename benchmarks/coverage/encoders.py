"""Text encoders of transformers."""

from __future__ import annotations

from benchmarks.coverage.given import floats, given
from benchmarks.coverage.inputs import tokens
from benchmarks.coverage.transformers_row import BOTH, PAD, Row

ROWS = (
    Row("albert", "AlbertModel", 2, spellings=BOTH, variants=PAD),
    Row("canine", "CanineModel", 4),
    Row("clip_text_model", "CLIPTextModel", 2),
    Row("convbert", "ConvBertModel", 2),
    Row("deberta", "DebertaModel", 2, variants=PAD),
    Row("deberta_v2", "DebertaV2Model", 2, variants=PAD),
    Row("distilbert", "DistilBertModel", 2, spellings=BOTH, variants=PAD),
    Row("dpr", "DPRQuestionEncoder", 2),
    Row("embedding_gemma2_text", "EmbeddingGemma2TextModel", 2),
    Row("esm", "EsmModel", 2, spellings=BOTH, variants=PAD),
    Row("esmc", "EsmcModel", 2, {"num_key_value_heads": 4}),
    Row("eurobert", "EuroBertModel", 2, spellings=BOTH, variants=PAD),
    Row("flaubert", "FlaubertModel", 2),
    Row("flava_text", "FlavaTextModel", 2),
    Row("fnet", "FNetModel", 0, negative=True),
    Row("funnel", "FunnelModel", 4, {"block_sizes": [1, 1], "d_head": 16}),
    Row("gte", "GteModel", 2),
    Row("ibert", "IBertModel", 2),
    Row(
        "instructblip_qformer",
        "InstructBlipQFormerModel",
        3,
        inputs=given(input_ids=tokens, query_embeds=floats(8, 64), encoder_hidden_states=floats(16, 64)),
    ),
    Row("jina_embeddings_v3", "JinaEmbeddingsV3Model", 2),
    Row("longformer", "LongformerModel", 2),
    Row("luke", "LukeModel", 2, {"entity_emb_size": 32}),
    Row("markuplm", "MarkupLMModel", 2),
    Row("mobilebert", "MobileBertModel", 2, {"intra_bottleneck_size": 64, "embedding_size": 32}),
    Row("modernbert", "ModernBertModel", 2, spellings=BOTH, variants=PAD),
    Row("mpnet", "MPNetModel", 2, spellings=BOTH, variants=PAD),
    Row("mra", "MraModel", 0),
    Row("nomic_bert", "NomicBertModel", 2, spellings=BOTH, variants=PAD),
    Row("nystromformer", "NystromformerModel", 6, {"num_landmarks": 8, "segment_means_seq_len": 64}),
    Row("openai_gpt", "OpenAIGPTModel", 2),
    Row("openai_privacy_filter", "OpenAIPrivacyFilterModel", 2),
    Row("splinter", "SplinterModel", 2),
    Row("squeezebert", "SqueezeBertModel", 2, {"embedding_size": 64}),
    Row("tapas", "TapasModel", 2),
    Row("tipsv2_text_model", "Tipsv2TextModel", 2),
    Row("ultrabert", "UltrabertModel", 2),
    Row("vits", "VitsModel", 2),
    Row("x_clip_text", "XCLIPTextModel", 2),
    Row("xlm", "XLMModel", 2),
    Row("xlnet", "XLNetModel", 2, variants=PAD),
    Row("yoso", "YosoModel", 0),
)
