"""A CT series as DICOM files."""

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")


def write_series(folder, slices=4, shape=(20, 16)):
    """A CT series whose files are not in the order of its slices; returns where each is bright, {UID: [H, W]}."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, series, marked = np.random.default_rng(0), pydicom.uid.generate_uid(), {}
    study, frame = pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    for number, i in enumerate(rng.permutation(slices)):
        data, uid = pydicom.Dataset(), pydicom.uid.generate_uid()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = uid
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = series, study, frame
        data.Modality, data.PatientID, data.PatientName, data.PatientSex, data.PatientBirthDate = "CT", "7", "", "", ""
        data.StudyDate = data.StudyTime = data.AccessionNumber = data.StudyID = data.ReferringPhysicianName = ""
        data.SeriesNumber, data.InstanceNumber = 3, int(i) + 1
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, float(2 * i)], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [0.5, 0.7], 2
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.RescaleSlope, data.RescaleIntercept = 15, 1, -1000
        data.Rows, data.Columns = shape
        marked[uid] = rng.random(shape) < 0.5
        data.PixelData = (marked[uid] * 1400).astype(np.int16).tobytes()
        data.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return marked
