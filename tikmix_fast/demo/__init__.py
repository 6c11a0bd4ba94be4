"""The demonstration: a small GPT trained on a mixture that follows Group Influence, beside a uniform one."""
