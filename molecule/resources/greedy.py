"""What transformers alone answers, greedy: ``greedy.py MODEL PERSONA QUESTION``; the token ids go to standard output as JSON."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path, persona, question = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
messages = [{"role": "system", "content": persona}, *question["messages"]]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
# the penalty of the model's own generation_config applies to both sides
answer = model.generate(**prompt, max_new_tokens=question["max_tokens"], do_sample=False, temperature=None, top_p=None, top_k=None)
print(json.dumps(answer[0, prompt["input_ids"].shape[1] :].tolist()))
