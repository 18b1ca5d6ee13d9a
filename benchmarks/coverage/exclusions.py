"""Families that are not built here, by the reason."""

_BY_REASON = (
    ("has no forward of its own", """
        bark, glm_image_vqmodel
    """),
    ("its small form has no layer of softmax attention", """
        bailing_hybrid, lfm3_vl, lfm3_vl_vision, minicpm_ocr, minicpmv4_6, minicpmv4_7, qwen3_5, qwen3_5_moe,
        qwen4_exp_text, sam3_lite_text_text_model
    """),
    ("needs detectron2", """
        layoutlmv2
    """),
    ("needs natten", """
        dinat
    """),
    ("needs scipy", """
        inkling_mm_model
    """),
    ("needs timm", """
        edgetam, edgetam_vision_model, fast_vlm, gemma3n, gemma3n_vision, omdet_turbo, pe_audio_video,
        pe_audio_video_encoder, pe_video, pe_video_encoder, perception_lm, timm, timm_backbone, timm_wrapper
    """),
    ("needs torchaudio", """
        higgs_audio_v2_tokenizer
    """),
    ("needs torchvision", """
        diffusers cosmos
    """),
    ("no attention in it", """
        bit, dinov3_convnext, efficientnet, hgnet_v2, mobilenet_v1, regnet, textnet
    """),
    ("sizes of its config depend on each other: not small by name alone", """
        blt, canary, clap, clvp, cohere_asr, cohere_compass, cohere_compass_text, cosmos3_edge, cosmos3_edge_text,
        csm, d_fine, dac, deepseek_ocr2, deimv2, depth_pro, dia, diffusion_gemma, dots3_note, efficientloftr,
        embedding_gemma2, encodec, ernie4_5_vl_moe, fastspeech2_conformer_with_hifigan, florence2, fun_asr_nano,
        gemma4, gemma4_audio, gemma4_unified, glm46v, glm4v, glm4v_moe, glm5_next, glm5_next_text, glm_image, glm_ocr,
        glmga, gradium_phonon_tts, granite4_vision, granite_docling, granite_speech, granite_speech5_ctc,
        granite_speech5_encoder, granite_speech_plus, hunyuan_vl, hunyuan_vl_text, kimi_k25_vision,
        kyutai_speech_to_text, lightglue, lw_detr, mamba2, maskformer, mimi_decoder, mimi_encoder, molmo2,
        moonshine_streaming, moss_transcribe_diarize_audio, muse_spark, muse_spark_audio, musicgen, musicgen_melody,
        nemo_speechlm, nemotron3_5_asr, nemotron3_5_transcribe_asr_audio, nemotron3_5_transcribe_audio,
        nemotron3_5_transcribe_word_timestamp, nemotron3_diarization, nemotron3_diarization_audio,
        nemotron_asr_streaming, nemotron_asr_streaming_encoder, neucodec, paddleocr_vl, parakeet_ctc, parakeet_rnnt,
        parakeet_tdt, pe_audio, pe_audio_encoder, pocket_tts, pocket_tts_audio_tokenizer,
        pocket_tts_audio_tokenizer_decoder, pocket_tts_audio_tokenizer_encoder, pp_doclayout_v3, pp_doclayout_v4,
        pp_ocrv5_mobile_rec, pp_ocrv5_server_rec, pp_ocrv6_medium_det, pp_ocrv6_small_det, pp_ocrv6_small_rec,
        pp_ocrv6_tiny_rec, qwen2_5_vl, qwen2_audio_encoder, qwen2_vl, qwen3_asr, qwen4_exp, rt_detr_v2, sam, sam2,
        sam2_video, sam2_vision_model, sam3, sam3_lite_text, sam3_tracker, sam_hq, seamless_m4t, seamless_m4t_v2,
        t5gemma2_encoder, tvp, udop, univnet, unlimited_ocr, uvdoc, vibevoice, vibevoice_acoustic_tokenizer,
        vibevoice_acoustic_tokenizer_decoder, vibevoice_acoustic_tokenizer_encoder, vibevoice_asr, voxtral,
        voxtral_encoder, voxtral_realtime, voxtral_realtime_text, xcodec, xcodec2, zamba, zaya
    """),
    ("wants more inputs than text, pictures or sound alone", """
        align, audioflamingo3, audioflamingo3_encoder, blip_2, chameleon, diffusers hunyuan_dit, diffusers
        unet_motion, edgetam_video, emu3, fun_asr_nano_encoder, gemma3n_audio, gemma4_vision, glmasr, grounding_dino,
        groupvit, inkling2_vision, instructblip, instructblipvideo, minicpm_ocr_vision, minicpmv4_7_vision,
        mm_grounding_dino, moss_transcribe_diarize, muse_glimmer_assistant, musicflamingo, oneformer, pi0,
        qwen2_5_omni_thinker, qwen2_audio, qwen3_asr_encoder, qwen3_omni_moe_thinker, sam3_tracker_video, sam3_video,
        seggpt, siglip2, video_llama_3_vision, videoprism, videoprism_vision_model, vision_text_dual_encoder, xclip
    """),
)  # fmt: skip

EXCLUSIONS = {name.strip(): reason for reason, names in _BY_REASON for name in " ".join(names.split()).split(",")}

# What is not ours in a compile error or a time-out, and how that is known: by (case, dynamic).
_LONG = "tracing with symbols alone takes longer than the limit, for every backend"
NOT_OURS = {
    ("hf/nystromformer/eager", False): "Dynamo's own error: plain Inductor has it too",
    ("hf/nystromformer/eager", True): "Dynamo's own error: plain Inductor has it too",
    ("hf/patchtst/eager", False): "plain aot_eager has it too; under Inductor it compiles, with both sites found",
    ("hf/patchtst/eager", True): "plain aot_eager has it too",
    ("hf/qwen3_next/eager", True): "plain Inductor has it too",
    ("hf/sam2_vision/eager", True): f"{_LONG}: plain Inductor did not end in 300 s",
    ("hf/swin/eager", True): f"{_LONG}: plain aot_eager took 409 s; with more time 4 of 4 are found",
    ("hf/swinv2/eager", True): f"{_LONG}: built like swin",
    ("hf/vitdet/eager", True): "an error of torch's tensorify_python_scalars: plain aot_eager has it too",
}
