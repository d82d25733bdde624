"""Texts that would do harm in a page that does not escape them."""

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "<!-- --> <![CDATA[ ]]> &lt; &amp;amp; ${alert(1)} {{7*7}}",
    "\x00\x07\x1b[31m\x7f\x85\u2028\u2029\u202e",
    "\ud800 lone \udfff",
    "a" * 10_000,
    "javascript:alert(1)",
    "$\\frac{1}{2}$ _under",
]
