"""The reward `vlm-judge`: a vision-language model marks pictures by a written rubric."""
