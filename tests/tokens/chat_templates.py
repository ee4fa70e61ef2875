"""Chat templates in the styles that models have, written for the tests."""

CHATML = """\
{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- set when = date_string if date_string is defined else strftime_now("%d %b %Y") %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if loop.first and message.role == 'system' %}{{ 'Today: ' + when + '\\n\\n' }}{% endif %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {%- generation %}{{- " " + message["content"] | trim + eos_token}}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

TOOLS = """\
{%- if tools %}
<|im_start|>system
    {%- if messages[0].role == 'system' %}{{ '\\n' + messages[0].content }}{% endif %}

# Tools
<tools>
{%- for tool in tools %}
{{ "\\n" }}{{ tool | tojson }}
{%- endfor %}

</tools><|im_end|>
{% endif %}
{%- set ns = namespace(last_query=0) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last_query = (messages | length) - loop.index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = '' %}
    {%- if message.content is string %}{% set content = message.content %}{% endif %}
    {%- if message.role == 'user' or (message.role == 'system' and not tools) %}
{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- if '</think>' in content and loop.index0 < ns.last_query %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
{{ '<|im_start|>assistant\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function %}
<tool_call>
{{ {"name": call.name, "arguments": call.arguments} | tojson(ensure_ascii=true, indent=1) }}
</tool_call>
        {%- endfor %}
<|im_end|>
    {%- elif message.role == 'tool' %}
<|im_start|>user
<tool_response>{{ content }}</tool_response><|im_end|>
    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

PLAIN = """\
{% for m in messages %}### {{ m.role | capitalize }}:
{{ m.content }}

{% endfor %}{% if add_generation_prompt %}### Assistant:
{% endif %}"""
