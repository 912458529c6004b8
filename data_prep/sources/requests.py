"""Source `requests`: recorded calls of a model, by any recorder and in any of four dialects; one record a conversation.

`data_prep/recorded/logs.py` lists the files, `call.py` the dialects, and `chains.py` says what a conversation is. The text of a turn
is what the server answered, and a turn that no answer holds is context.
"""

from data_prep.recorded.logs import accept, session_records

records, convert = session_records, accept
