"""What vLLM makes of checkpoints; runs in an environment with vLLM and without moetools.

    python vllm_logprobs.py CHECKPOINT... < prompts.json > answers.json

Prompts are lists of token ids. For each checkpoint and prompt: the natural log-probability of
every token but the first, and ids and log-probabilities of a greedy continuation.
"""

import json
import os
import sys

NUM_TOKENS = 16


def main() -> None:
    prompts = json.load(sys.stdin)
    stdout = os.dup(1)
    os.dup2(2, 1)  # vLLM prints to stdout
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answers = [answer(path, prompts) for path in sys.argv[1:]]
    with os.fdopen(stdout, "w") as out:
        json.dump(answers, out)


def answer(path: str, prompts: list[list[int]]) -> list[dict]:
    """One entry for each prompt."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    model = LLM(
        path,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        distributed_executor_backend="uni",
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        prompt_logprobs=0,
        logprobs=0,
        detokenize=False,
    )
    outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    answers = []
    for output in outputs:
        first = output.outputs[0]
        ids = list(first.token_ids)
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        answers.append(
            {
                "prompt": [place[token].logprob for token, place in pairs],
                "ids": ids,
                "continuation": [
                    place[token].logprob for token, place in zip(ids, first.logprobs, strict=True)
                ],
            }
        )
    del model
    cleanup_dist_env_and_memory()
    return answers


if __name__ == "__main__":
    main()
