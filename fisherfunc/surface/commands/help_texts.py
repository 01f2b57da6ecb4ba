"""What `--help` says above the options of each command."""

SPECTRUM_HELP = """Compute the exact spectrum of the per-token empirical Fisher of a language model.

With F = (1/N) Σ g gᵀ over the gradients g of the N token losses, this prints the eigenvalue metrics of each
block of F, of its block-diagonal part and of the full matrix, and writes spectrum.json (everything),
eigenvalues.csv, spectrum.png/.svg and couplings.png/.svg into --out. Without arguments it runs a small model
and a text that come with the package. --targets makes it the true Fisher. --method lanczos computes the leading
eigenvalues of the full matrix alone, certified, of more tokens than N × N matrices have room for.

\b
Examples:
  fisherfunc spectrum
  fisherfunc spectrum --checkpoint init --out before-training
  fisherfunc spectrum --model ./my-model --text book.txt --tokens 1024
  fisherfunc spectrum --model gpt2 --text - --blocks module < book.txt
  fisherfunc spectrum --tokens 2048 --intervals jackknife
  fisherfunc spectrum --targets sampled --draws 4 --tokens 128
  fisherfunc spectrum --format json | jq .full.effective_rank
  fisherfunc spectrum --model ./large --text book.txt --resume ./kept
  fisherfunc spectrum --method lanczos --text book.txt --tokens 100000

\b
Columns of the table:
  tokens            N, what F is an average over
  parameters        P, the size of the block
  λ_max, λ_2        the two largest eigenvalues; gap is their difference
  condition number  λ_max over the smallest eigenvalue above the resolution; ≥
                    where others lie below it
  eff. rank         exp of the entropy of λ/Σλ: how many directions matter
  trace             Σλ, the mean squared norm of a token's gradient

Windows are spread evenly over the text; of standard input they are the first ones. Each line of a .jsonl file
is a document, a string or {"text": …}, and documents count as independent, not windows.

\b
Of each window:
  causal models         each token but the first is predicted
  masked models         15 % of its tokens, chosen by --seed, are predicted
  sequence-to-sequence  the first half is read, the second predicted
"""

PLAN_HELP = """Predict what `fisherfunc spectrum` would do with the same options, and what it would take.

No token is passed over and no file is written: a forward pass finds the tokens, a probe the structure of the model,
and about a second of calibration the speed of this machine.

\b
Examples:
  fisherfunc plan
  fisherfunc plan --model gpt2 --text book.txt --tokens 1024 --memory 2GB
  fisherfunc plan --format json | jq .seconds.total
  fisherfunc plan --tokens 8192 --pilot sotu-llama-final

\b
Routes of parameters:
  pairwise      inner products of output cotangents and of inputs; no gradient is formed
  points        the same where a weight acts at one place of a sequence
  output layer  the same, in closed form
  rows          gradients are formed, where that is cheaper
  elementwise   gradients of biases, norms and such
  autograd      gradients are formed, as no rule knows the use; the table says which
  slabs         gradients are formed slab by slab: it does not fit the memory limit otherwise
"""

TOKENS_HELP = """Print which tokens carry the leading eigenvectors of the empirical Fisher.

With v an eigenvector of F = (1/N) Σ g gᵀ and λ its eigenvalue, the token of gradient g has the coefficient
⟨g, v⟩/√(λN), and the square of it is its share in λ. No file is written.

\b
Examples:
  fisherfunc tokens
  fisherfunc tokens --block layer.0 --vectors 2 --top 20
  fisherfunc tokens --model gpt2 --text book.txt --blocks module --block mlp
  fisherfunc tokens --format json | jq '.tokens[] | [.share, .text]'
"""
