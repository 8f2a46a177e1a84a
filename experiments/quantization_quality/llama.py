"""llama.cpp's own quantizer, run by an interpreter that has llama_cpp installed. Tables (embeddings, head) in Q8_0.

python experiments/quantization_quality/llama.py IN.gguf OUT.gguf Q4_K_M
"""

import sys

import llama_cpp

_Q8_0 = 8  # of ggml's types


def main() -> None:
    source, output, kind = sys.argv[1:]
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = 1
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.output_tensor_type = options.token_embedding_type = _Q8_0
    failed = llama_cpp.llama_model_quantize(source.encode(), output.encode(), options)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
