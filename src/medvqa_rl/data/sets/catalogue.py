"""The supported data sets: contents, licences and sources. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A data set as listed by ``medvqa-rl data list``. Numbers are those of its authors."""

    name: str
    """The value of ``data.name``."""
    what: str
    splits: str
    columns: str
    """Columns or fields that are read."""
    terms: str
    """Licence as stated by the authors."""
    source: str
    """Where to download it."""


ENTRIES = (
    Entry(
        "phantom",
        "PhantomVQA: generated images, questions with known answers",
        "train (endless), val, test; scanners home, unseen and worn",
        "none: generated on demand",
        "Apache-2.0, part of this package",
        "nothing to download",
    ),
    Entry(
        "vqa_rad",
        "VQA-RAD: clinicians' questions about radiology images, in the authors' format",
        "train 1,797 (val is a tenth of its images), test 451; 202 of 203 test images are in train",
        "image_name, question, answer, answer_type, question_type, image_organ, phrase_type, qid",
        "CC0 1.0",
        "https://osf.io/89kps/",
    ),
    Entry(
        "vqa_rad_hub",
        "VQA-RAD, copy on the Hugging Face Hub without organs and question types",
        "train 1,793, test 451",
        "image, question, answer",
        "CC0 1.0",
        "https://huggingface.co/datasets/flaviagiammarino/vqa-rad",
    ),
    Entry(
        "pmc_vqa",
        "PMC-VQA: four options about figures of articles; v1, v1_clean or v2",
        "v1: train, test or test_clean; v2: train 152,603, test 33,430",
        "Figure_path, Question, Choice A to D, Answer, Answer_label",
        "CC BY-SA",
        "https://huggingface.co/datasets/xmcmic/PMC-VQA",
    ),
    Entry(
        "slake_en",
        "SLAKE, English questions",
        "train 4,919, val 1,053, test 1,061 over 450, 96 and 96 images",
        "img_name, question, answer, q_lang, answer_type, modality, location, content_type, qid",
        "CC BY 4.0",
        "https://www.med-vqa.com/slake/",
    ),
    Entry(
        "slake_zh",
        "SLAKE, Chinese questions; not to be mixed with the English ones, whose test images are in train here",
        "train, val, test",
        "as slake_en",
        "CC BY 4.0",
        "https://www.med-vqa.com/slake/",
    ),
    Entry(
        "path_vqa",
        "Path-VQA: questions about pathology images from textbooks",
        "train 19,654, val 6,259, test 6,719 in the Hub copy, "
        "without the duplicates of the original (19,755, 6,279, 6,761)",
        "image, question, answer",
        "MIT according to the Hub copy; images are copyright of the books and the library",
        "https://huggingface.co/datasets/flaviagiammarino/path-vqa",
    ),
    Entry(
        "vqa_med",
        "VQA-Med 2019: modality, plane, organ and abnormality in radiology images",
        "train 12,792, val 2,000, test 500 over 3,200, 500 and 500 images",
        "image name | question | answer",
        "as stated by the organisers of ImageCLEF",
        "https://github.com/abachaa/VQA-Med-2019",
    ),
    Entry(
        "omnimed",
        "OmniMedVQA: multiple-choice questions from 73 medical image data sets",
        "test only; 127,995 questions, some without images",
        "image_path, question, option_A to option_D, gt_answer",
        "those of the 73 data sets",
        "https://huggingface.co/datasets/foreverbeliever/OmniMedVQA",
    ),
    Entry(
        "med_r1",
        "OmniMedVQA as Med-R1 divides it, by modality or by task; data.path is the folder with train and test",
        "train (val is a tenth of its images), test",
        "image, problem (with its options), solution (the letter)",
        "those of OmniMedVQA",
        "https://github.com/Yuxiang-Lai117/Med-R1",
    ),
    Entry(
        "medxpertqa",
        "MedXpertQA MM: questions of medical boards with five options and one or more images",
        "test only, 2,000",
        "id, question, options, label, images, medical_task, body_system, question_type",
        "MIT",
        "https://huggingface.co/datasets/TsinghuaC3I/MedXpertQA",
    ),
    Entry(
        "mmmu_medical",
        "MMMU, its five medical subjects: college exams with up to seven images",
        "test only: the 150 validation questions, because the answers of the test split are not published",
        "id, question, options, answer, question_type, image_1 to image_7, subfield, topic_difficulty",
        "Apache-2.0",
        "https://huggingface.co/datasets/MMMU/MMMU",
    ),
    Entry(
        "own",
        "your own questions: a table or the records of another tool, with a folder of images",
        "yours, or created by `medvqa-rl data split`",
        "see docs/data.md",
        "yours",
        "your own disk",
    ),
)
"""In the order of ``data.name``."""
