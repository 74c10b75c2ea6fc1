"""Files of questions in the form that authors of judges publish them."""

VIE = '''
_context_no_delimit_reasoning_first = """Answer as { "reasoning", "score" }"""
_prompts_0shot_two_image_edit_rule = """Two pictures."""
_prompts_0shot_tie_rule_SC = """From 0 to 10.
Editing instruction: <instruction>"""
_prompts_0shot_rule_PQ = """One picture, from 0 to 10."""
'''
LISTS = '''
QUALITY_CHECKLIST = """## Detail
- Noise: Is there noise?
- Edge Clarity: Are edges sharp?
## Realism
- Physical Logic: Does it fall down?"""
ALIGNMENT_CHECKLIST = """## Attributes
- Color: Right?"""
AESTHETICS_CHECKLIST = ALIGNMENT_CHECKLIST_TWICE = """## Lighting
- Light: Right?"""
SYSTEM_PROMPT = (
    "You are an expert. "
    "You look."
)
USER_PROMPT_TEMPLATE = """# Prompt
{prompt}
<image>
# {level1_dim}
{format_checklist}
{{"a": 0}}"""
raise RuntimeError("read, not run")
'''
