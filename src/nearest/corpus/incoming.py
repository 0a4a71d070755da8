"""Documents on their way in: from whatever a caller gives to what is tokenised."""

from collections.abc import Iterable, Iterator

from nearest.corpus.documents import Document, as_documents
from nearest.corpus.reading import Corpus
from nearest.corpus.tokens import TokenRules
from nearest.corpus.unique import with_unique_ids


def incoming_documents(
    documents: Iterable[Document | str], rules: TokenRules
) -> Iterator[Document]:
    """Check documents one by one as they are read.

    Args:
        documents: documents, plain strings, or a corpus that `read_documents` opened.
        rules: of the model; for an encoder–decoder, rows of a corpus give what its encoder reads.

    Raises:
        CorpusError: a document is empty or cannot be stored, or an id stands twice.
    """
    if isinstance(documents, Corpus) and rules.encoder_vocab_size is not None:
        documents = documents.for_encoder()
    return with_unique_ids(as_documents(documents))
