"""DICOM mammograms made from arrays, and canaries in every place where a header may name somebody."""

from __future__ import annotations

import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gdcm
import openjpeg
from numpy.typing import NDArray
from pydicom import dcmread, uid
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
from pydicom.sequence import Sequence
from pydicom.tag import Tag

SYNTAXES = {
    "implicit": uid.ImplicitVRLittleEndian,
    "explicit": uid.ExplicitVRLittleEndian,
    "big": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
    "rle": uid.RLELossless,
    "jpeg": uid.JPEGBaseline8Bit,
    "jpeg-lossless-57": uid.JPEGLossless,
    "jpeg-lossless": uid.JPEGLosslessSV1,
    "jpeg-ls": uid.JPEGLSLossless,
    "jpeg-ls-near": uid.JPEGLSNearLossless,
    "j2k": uid.JPEG2000Lossless,
    "j2k-lossy": uid.JPEG2000,
}
"""Short names of the transfer syntaxes that `write_dicom` writes."""

NEAR = 2
"""By how much a value may change in `jpeg-ls-near`."""

DEFAULTS: dict[str, Any] = {
    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.2",
    "SOPInstanceUID": "1.2.826.0.1.3680043.8.498.1",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.2",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.3",
    "PatientID": "patient-1",
    "PatientName": "Doe^Jane",
    "Modality": "MG",
    "PresentationIntentType": "FOR PRESENTATION",
    "ImageType": ["DERIVED", "PRIMARY"],
    "Manufacturer": "HOLOGIC, Inc.",
    "ImageLaterality": "L",
    "ViewPosition": "CC",
    "ImagerPixelSpacing": [0.07, 0.07],
    "BurnedInAnnotation": "NO",
    "QualityControlImage": "NO",
    "PresentationLUTShape": "IDENTITY",
    "PhotometricInterpretation": "MONOCHROME2",
    "SamplesPerPixel": 1,
}


def write_dicom(path: Path, pixels: NDArray[Any], *, syntax: str = "explicit", **tags: Any) -> Path:
    """Write an (H, W) array as a mammogram; `syntax` is a key of SYNTAXES.

    Tags are keywords of DICOM and their values; None leaves one out. BitsStored is 12 for 16-bit arrays unless said
    otherwise, and signed arrays set PixelRepresentation. Lists of Dataset become sequences.
    """
    return save(path, mammogram(pixels, syntax=syntax, **tags))


def mammogram(pixels: NDArray[Any], *, syntax: str = "explicit", **tags: Any) -> FileDataset:
    """The data set that `write_dicom` writes, to be altered before `save`."""
    allocated = 8 * pixels.dtype.itemsize
    image: dict[str, Any] = {
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": allocated,
        "BitsStored": min(allocated, 12),
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    image |= DEFAULTS | tags
    if image["BitsStored"] is not None:
        image.setdefault("HighBit", image["BitsStored"] - 1)
    header = FileDataset("", Dataset(), preamble=b"\0" * 128, file_meta=FileMetaDataset())
    for keyword, value in image.items():
        if value is not None:
            setattr(header, keyword, value)
    header.file_meta.MediaStorageSOPClassUID = header.get("SOPClassUID", "1.2.3")
    header.file_meta.MediaStorageSOPInstanceUID = header.get("SOPInstanceUID", "1.2.3")
    header.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    header.PixelData = _encoded(pixels, header, syntax)
    header["PixelData"].VR = "OB" if SYNTAXES[syntax].is_encapsulated or allocated == 8 else "OW"
    header["PixelData"].is_undefined_length = SYNTAXES[syntax].is_encapsulated
    return header


def save(path: Path, header: FileDataset) -> Path:
    """Write a data set as it is, sound or not."""
    syntax = header.file_meta.TransferSyntaxUID
    header.set_original_encoding(syntax == uid.ImplicitVRLittleEndian, syntax != uid.ExplicitVRBigEndian)
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    path.write_bytes(buffer.getvalue())
    return path


def lut(entries: NDArray[Any], first: int, bits: int) -> Dataset:
    """An item of a VOI or modality LUT sequence."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries) % 65536, first, bits])
    if len(entries) < 32768:
        item.add_new("LUTData", "US", [int(entry) for entry in entries])
    else:
        item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    item.ModalityLUTType = "US"
    return item


def _encoded(pixels: NDArray[Any], header: Dataset, syntax: str) -> bytes:
    if not SYNTAXES[syntax].is_encapsulated:
        raw = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == "big" else "<")).tobytes()
        return raw + b"\0" * (len(raw) % 2)
    if syntax == "rle":
        options = {"rows": header.Rows, "columns": header.Columns, "number_of_frames": 1, "samples_per_pixel": 1}
        options |= {"bits_allocated": header.BitsAllocated, "bits_stored": header.BitsStored}
        options |= {"pixel_representation": header.PixelRepresentation, "photometric_interpretation": "MONOCHROME2"}
        stream = get_encoder(uid.RLELossless).encode(pixels, encoding_plugin="pydicom", **options)
        return encapsulate([stream])
    if syntax == "j2k-lossy":
        bits = header.BitsStored
        stream = openjpeg.encode(pixels, bits_stored=bits, photometric_interpretation=2, compression_ratios=[8])
        return encapsulate([stream])
    return _compressed(pixels, header, SYNTAXES[syntax])


def _compressed(pixels: NDArray[Any], header: Dataset, syntax: uid.UID) -> bytes:
    """The pixels as GDCM's encoders write them, in items."""
    tags = {"BitsStored": header.BitsStored, "PixelRepresentation": header.PixelRepresentation}
    with TemporaryDirectory() as folder:
        plain, packed = Path(folder, "plain.dcm"), Path(folder, "packed.dcm")
        write_dicom(plain, pixels, **tags)
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(plain))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
        near = gdcm.JPEGLSCodec()
        near.SetLossless(False)
        near.SetLossyError(NEAR)
        if syntax == uid.JPEGLSNearLossless:
            change.SetUserCodec(near)
        change.SetInput(reader.GetImage())
        if not change.Change():
            raise ValueError(f"GDCM does not write {syntax.name}")
        writer.SetFileName(str(packed))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        stream: bytes = dcmread(packed).PixelData
    return stream


_KEYWORDS = """
    AccessionNumber AcquisitionComments AcquisitionContextSequence AcquisitionDate AcquisitionDateTime
    AcquisitionDeviceProcessingDescription AcquisitionFieldOfViewLabel AcquisitionProtocolDescription AcquisitionTime
    AcquisitionUID ActualHumanPerformersSequence AdditionalPatientHistory AddressTrial AdmissionID AdmittingDate
    AdmittingDiagnosesCodeSequence AdmittingDiagnosesDescription AdmittingTime Allergies AuthorObserverSequence
    BranchOfService CassetteID ClinicalTrialCoordinatingCenterName ClinicalTrialProtocolID ClinicalTrialProtocolName
    ClinicalTrialSeriesDescription ClinicalTrialSeriesID ClinicalTrialSiteID ClinicalTrialSiteName
    ClinicalTrialSponsorName ClinicalTrialSubjectID ClinicalTrialSubjectReadingID ClinicalTrialTimePointDescription
    ClinicalTrialTimePointID CommentsOnRadiationDose CommentsOnThePerformedProcedureStep ConcatenationUID
    ConfidentialityConstraintOnPatientDataDescription ContainerComponentID ContainerDescription ContainerIdentifier
    ContentCreatorIdentificationCodeSequence ContentCreatorName ContentDate ContentSequence ContentTime
    ContextGroupExtensionCreatorUID ContrastBolusAgent ContrastBolusStartTime ContrastBolusStopTime
    ContributionDescription CountryOfResidence CreationDate CreatorVersionUID CurrentPatientLocation
    CustodialOrganizationSequence DataSetDescription DataSetTrailingPadding DateOfLastCalibration
    DateOfLastDetectorCalibration DateOfSecondaryCapture DateTimeOfLastCalibration DeidentificationMethod
    DerivationDescription DetectorDescription DetectorID DeviceAlternateIdentifier DeviceDescription DeviceLabel
    DeviceSerialNumber DeviceSettingDescription DeviceUID DigitalSignatureDateTime DigitalSignaturesSequence
    DigitalSignatureUID DimensionOrganizationUID DischargeDiagnosisDescription DistributionAddress DistributionName
    DoseReferenceUID EndAcquisitionDateTime EthnicGroup ExpectedCompletionDateTime ExposureControlModeDescription
    FailedSOPInstanceUIDList FiducialUID FillerOrderNumberImagingServiceRequest FirstTreatmentDate
    FrameAcquisitionDateTime FrameComments FrameOfReferenceUID FrameReferenceDateTime GantryID GeneratorID
    GraphicAnnotationSequence HumanPerformerName HumanPerformerOrganization IconImageSequence IdentifyingComments
    ImageComments ImagePresentationComments ImagingServiceRequestComments Impressions InstanceCoercionDateTime
    InstanceCreationDate InstanceCreationTime InstanceCreatorUID InstitutionAddress InstitutionalDepartmentName
    InstitutionCodeSequence InstitutionName InsurancePlanIdentification
    IntendedRecipientsOfResultsIdentificationSequence InterpretationApproverSequence InterpretationAuthor
    InterpretationDiagnosisDescription InterpretationIDIssuer InterpretationRecorder InterpretationText
    InterpretationTranscriber IrradiationEventUID IssueDateOfImagingServiceRequest IssuerOfAdmissionID
    IssuerOfPatientID IssuerOfServiceEpisodeID IssueTimeOfImagingServiceRequest LargePaletteColorLookupTableUID
    LastMenstrualDate LensMake LensModel LensSerialNumber LensSpecification LongDeviceDescription MAC MakerNote
    ManufacturerDeviceIdentifier ManufacturerModelName MedicalAlerts MedicalRecordLocator MilitaryRank
    ModifiedAttributesSequence ModifiedImageDescription ModifyingDeviceID ModifyingDeviceManufacturer ModifyingSystem
    MostRecentTreatmentDate NameOfPhysiciansReadingStudy NamesOfIntendedRecipientsOfResults ObservationDateTime
    ObservationSubjectUIDTrial ObservationUID Occupation OperatorIdentificationSequence OperatorsName
    OrderCallbackPhoneNumber OrderCallbackTelecomInformation OrderEnteredBy OrderEntererLocation
    OriginalAttributesSequence OtherPatientIDs OtherPatientIDsSequence OtherPatientNames OverlayDate OverlayTime
    PaletteColorLookupTableUID ParticipantSequence PatientAddress PatientAge PatientBirthDate PatientBirthName
    PatientBirthTime PatientComments PatientID PatientInstitutionResidence PatientInsurancePlanCodeSequence
    PatientMotherBirthName PatientName PatientPrimaryLanguageCodeSequence PatientReligiousPreference
    PatientSetupPhotoDescription PatientSize PatientState PatientTelecomInformation PatientTelephoneNumbers
    PatientTransportArrangements PatientWeight PerformedLocation PerformedProcedureStepDescription
    PerformedProcedureStepEndDate PerformedProcedureStepEndDateTime PerformedProcedureStepEndTime
    PerformedProcedureStepID PerformedProcedureStepStartDate PerformedProcedureStepStartDateTime
    PerformedProcedureStepStartTime PerformedStationAETitle PerformedStationGeographicLocationCodeSequence
    PerformedStationName PerformedStationNameCodeSequence PerformingPhysicianIdentificationSequence
    PerformingPhysicianName PersonAddress PersonIdentificationCodeSequence PersonName PersonTelecomInformation
    PersonTelephoneNumbers PhysicianApprovingInterpretation PhysiciansOfRecord
    PhysiciansOfRecordIdentificationSequence PhysiciansReadingStudyIdentificationSequence PixelDataProviderURL
    PlacerOrderNumberImagingServiceRequest PlateID PreMedication ProcedureStepCancellationDateTime
    ProductExpirationDateTime ProtocolName ReasonForOmissionDescription ReasonForStudy
    ReasonForTheImagingServiceRequest ReasonForTheRequestedProcedure ReferencedDigitalSignatureSequence
    ReferencedFrameOfReferenceUID ReferencedGeneralPurposeScheduledProcedureStepTransactionUID ReferencedImageSequence
    ReferencedObservationUIDTrial ReferencedPatientAliasSequence ReferencedPatientPhotoSequence
    ReferencedPatientSequence ReferencedPerformedProcedureStepSequence ReferencedSOPInstanceMACSequence
    ReferencedSOPInstanceUID ReferencedSOPInstanceUIDInFile ReferencedStudySequence ReferringPhysicianAddress
    ReferringPhysicianIdentificationSequence ReferringPhysicianName ReferringPhysicianTelephoneNumbers
    RegionOfResidence RelatedFrameOfReferenceUID RequestAttributesSequence RequestedContrastAgent
    RequestedProcedureComments RequestedProcedureDescription RequestedProcedureID RequestedProcedureLocation
    RequestingPhysician RequestingService ResponsibleOrganization ResponsiblePerson ResultsComments
    ResultsDistributionListSequence ResultsID ResultsIDIssuer ReviewerName ROIDescription SafePositionExitDate
    ScheduledHumanPerformersSequence ScheduledPatientInstitutionResidence
    ScheduledPerformingPhysicianIdentificationSequence ScheduledPerformingPhysicianName
    ScheduledProcedureStepDescription ScheduledProcedureStepEndDate ScheduledProcedureStepEndTime
    ScheduledProcedureStepExpirationDateTime ScheduledProcedureStepID ScheduledProcedureStepLocation
    ScheduledProcedureStepStartDate ScheduledProcedureStepStartDateTime ScheduledProcedureStepStartTime
    ScheduledStationAETitle ScheduledStationGeographicLocationCodeSequence ScheduledStationName ScheduledStudyLocation
    ScheduledStudyLocationAETitle SecondaryCaptureDeviceID SecondaryCaptureDeviceManufacturer
    SecondaryCaptureDeviceManufacturerModelName SeriesDate SeriesDescription SeriesInstanceUID SeriesTime
    ServiceEpisodeDescription ServiceEpisodeID SlideIdentifier SoftwareVersions SOPInstanceUID
    SourceFrameOfReferenceUID SourceIdentifier SourceImageSequence SourceSerialNumber SpecialNeeds
    SpecimenAccessionNumber SpecimenDetailedDescription SpecimenIdentifier SpecimenShortDescription SpecimenUID
    StartAcquisitionDateTime StationName StorageMediaFileSetID StorageMediaFileSetUID StrainDescription
    StructureSetDate StructureSetDescription StructureSetLabel StructureSetName StructureSetTime StudyArrivalDate
    StudyArrivalTime StudyComments StudyCompletionDate StudyCompletionTime StudyDate StudyDescription StudyID
    StudyIDIssuer StudyInstanceUID StudyReadDate StudyReadTime StudyTime StudyVerifiedDate StudyVerifiedTime
    SynchronizationFrameOfReferenceUID TargetUID TelephoneNumberTrial TemplateExtensionCreatorUID
    TemplateExtensionOrganizationUID TextComments TextString TimeOfLastCalibration TimeOfLastDetectorCalibration
    TimeOfSecondaryCapture TimezoneOffsetFromUTC TopicAuthor TopicKeywords TopicSubject TopicTitle TransactionUID
    TreatmentDate TreatmentTime TriggerTimeOffset UDISequence UID UniqueDeviceIdentifier VerbalSourceTrial
    VerifyingObserverName VerifyingObserverSequence VerifyingOrganization VisitComments VisitStatusID XRaySourceID
"""
CANARIES = _KEYWORDS.split()
"""Tags that PS3.15 table E.1-1 (basic confidentiality profile) removes, empties or replaces, by keyword."""

SOUGHT_FROM = 6
"""Shorter canaries (an age: four characters) turn up by chance; a search should leave them out."""


def plant(header: FileDataset) -> dict[str, str]:
    """Put a value of its own into every tag of CANARIES, private ones, sequences, overlays, curves and the preamble.

    Returns what was put where: the tag's name -> the text to look for. Pixels and what describes them stay.
    """
    planted: dict[str, str] = {}
    for number, keyword in enumerate(CANARIES):
        setattr(header, keyword, _canary(dictionary_VR(keyword), keyword, number, planted))
    item = Dataset()
    for number, keyword in enumerate(("PatientName", "PatientID", "StudyDate", "SOPInstanceUID"), 900):
        setattr(item, keyword, _canary(dictionary_VR(keyword), f"nested.{keyword}", number, planted))
    header.ReferencedSeriesSequence = Sequence([item])
    _plant_odd(header, planted)
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.file_meta.SourceApplicationEntityTitle = _canary("AE", "meta.ApplicationEntity", 950, planted)
    header.file_meta.SendingApplicationEntityTitle = _canary("AE", "meta.SendingEntity", 951, planted)
    header.file_meta.PrivateInformationCreatorUID = _canary("UI", "meta.PrivateCreator", 952, planted)
    header.file_meta.PrivateInformation = _canary("OB", "meta.PrivateInformation", 953, planted)
    header.preamble = _canary("OB", "preamble", 954, planted).ljust(128, b"\0")
    return planted


def _plant_odd(header: FileDataset, planted: dict[str, str]) -> None:
    """Private groups, overlays and curves: what no keyword names."""
    for group in (0x0009, 0x0019, 0x07A3, 0x7FDF):
        block = header.private_block(group, f"CANARY CREATOR {group:04X}", create=True)
        planted[f"private.{group:04X}.creator"] = f"CANARY CREATOR {group:04X}"
        for offset, vr in enumerate(("LO", "PN", "DA", "UN", "UI", "LT")):
            block.add_new(offset, vr, _canary(vr, f"private.{group:04X}.{offset}", 10000 + 8 * group + offset, planted))
    for group, number in ((0x6000, 960), (0x6002, 970), (0x5000, 980)):
        overlay = group >= 0x6000
        for element, vr in ((0x0022, "LO"), (0x4000, "LT"), (0x1500, "LO")) if overlay else ((0x0022, "LO"),):
            tag = Tag(group, element)
            header.add_new(tag, vr, _canary(vr, f"{group:04X}.{keyword_for_tag(tag) or element}", number, planted))
            number += 1
        bits = _canary("OB", f"{group:04X}.data", number, planted).ljust(128, b"\0")
        header.add_new(Tag(group, 0x3000), "OW", bits)


def _canary(vr: str, name: str, number: int, planted: dict[str, str]) -> Any:
    """A value of the type that occurs nowhere else; sequences hold it in an item."""
    marked = f"Canary{number:05d}"
    values = {
        "PN": f"{marked}^Jane",
        "DA": f"{1901 + number // 336 % 200}{1 + number // 28 % 12:02d}{1 + number % 28:02d}",
        "TM": f"{number % 24:02d}{number % 60:02d}{number * 7 % 60:02d}.{number * 991 % 1000000:06d}",
        "DT": f"1931{1 + number % 12:02d}{1 + number % 28:02d}0405{number % 60:02d}.{number * 577 % 1000000:06d}",
        "UI": f"1.2.826.0.1.3680043.9.7777.{number}.31415926",
        "AS": f"{number % 100:03d}Y",
        "IS": str(700000000 + number),
        "DS": f"{number}.70707",
        "US": 40000 + number,
        "CS": f"CANARY {number:05d}",
        "AE": f"CANARY{number:05d}",
        "UR": f"http://canary.example/{number:05d}",
        "OB": marked.encode().ljust(16, b"\0"),
        "UN": marked.encode().ljust(16, b"\0"),
    }
    if vr == "SQ":
        item = Dataset()
        item.CodeMeaning = item.TextValue = planted[name] = f"{marked} in {name}"[:60]
        return Sequence([item])
    value = values.get(vr, marked)
    planted[name] = marked if isinstance(value, bytes) else str(value)
    return value
