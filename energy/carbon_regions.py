"""Grid carbon intensity of cloud regions: one yearly mean each, in grams of CO2 per kWh. Values only.

Source: Google's published figures for its regions (cloud.google.com/sustainability/region-carbon), as collected in
CodeCarbon 3.3.2 (MIT). A region stands for its grid, whoever runs the data centre; a yearly mean says nothing about the
hour.
"""

SOURCE = "Google Cloud region carbon data, by CodeCarbon 3.3.2"
REGION_G_PER_KWH: dict[str, float] = {
    "africa-south1": 646,  # South Africa
    "asia-east1": 451,  # Taiwan
    "asia-east2": 360,  # China
    "asia-northeast1": 459,  # Japan
    "asia-northeast2": 385,  # Japan
    "asia-northeast3": 378,  # Korea
    "asia-south1": 648,  # India
    "asia-south2": 529,  # India
    "asia-southeast1": 369,  # Singapore
    "asia-southeast2": 580,  # Indonesia
    "australia-southeast1": 501,  # Australia
    "australia-southeast2": 456,  # Australia
    "europe-central2": 723,  # Poland
    "europe-north1": 46,  # Finland
    "europe-southwest1": 131,  # Spain
    "europe-west1": 122,  # Belgium
    "europe-west2": 136,  # United Kingdom
    "europe-west3": 345,  # Germany
    "europe-west4": 236,  # Netherlands
    "europe-west6": 59,  # Switzerland
    "europe-west8": 249,  # Italy
    "europe-west9": 34,  # France
    "europe-west10": 345,  # Germany
    "europe-west12": 249,  # Italy
    "me-central1": 575,  # Qatar
    "me-central2": 569,  # Saudi Arabia
    "me-west1": 463,  # Israel
    "northamerica-northeast1": 2,  # Canada
    "northamerica-northeast2": 47,  # Canada
    "southamerica-east1": 56,  # Brazil
    "southamerica-west1": 138,  # Chile
    "us-central1": 430,  # USA
    "us-east1": 560,  # USA
    "us-east4": 322,  # USA
    "us-east5": 322,  # USA
    "us-south1": 321,  # USA
    "us-west1": 94,  # USA
    "us-west2": 198,  # USA
    "us-west3": 588,  # USA
    "us-west4": 373,  # USA
}
