"""Names, cities and jobs of the generated facts that maps are fitted on.

Those that the demo measures on share no word with them: no fact of an evaluation can be remembered
from the fit.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """Lists of single words, so that an answer is one word."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    cities: tuple[str, ...]
    jobs: tuple[str, ...]


def words_of(text: str) -> tuple[str, ...]:
    """The words of a block of text."""
    return tuple(text.split())


FIT = Words(
    first=words_of(
        """
        Aaron Abigail Adele Adrian Agnes Aisha Alan Albert Alejandra Alice Alina Amara Amelia
        Amir Anders Andrea Angela Anika Anita Anton Ariel Arthur Astrid Audrey Barbara Beatrice
        Benjamin Bernard Bianca Boris Brenda Brian Bruno Camille Carla Carlos Carmen Caroline
        Cecilia Charles Chiara Chloe Christine Clara Claude Colin Dalia Daniel Daphne David
        Deborah Denise Derek Diana Diego Dmitri Dominic Doris Dorothy Douglas Edgar Edith Edward
        Eileen Elena Elias Elise Elizabeth Emil Emily Emma Enrique Erica Ernest Esther Eugene
        Evelyn Fatima Felix Fernando Fiona Francis Frank Frederick Gabriel Gemma George Gerald
        Gloria Grace Graham Greta Gustav Hannah Harold Harriet Hassan Hazel Heather Helen Henry
        Hiroshi Hugo Ian Ibrahim Ida Igor Imani Ines Ingrid Irene Isaac Isabel Ivan Jacob James
        Janet Jasmin Jean Jennifer Jerome Joan Joel Johanna John Jonas Joseph Joyce Juan Judith
        Julia Karen Karl Katherine Keiko Kenneth Kevin Klaus Lars Laura Lawrence Leah Leo Leila
        Lena Leonard Linda Lorenzo Louise Lucas Lucy Luisa Magnus Malik Manuel Marcus Margaret
        Maria Marie Mario Martha Martin Mary Matilda Matthew Maurice Max
        """
    ),
    last=words_of(
        """
        Abbott Adams Adler Aguilar Ahmed Alvarez Andersen Andrews Archer Armstrong Arnold Ashby
        Atkins Austen Baker Baldwin Banerjee Barker Barnes Barrett Barton Bauer Becker Bell
        Bennett Berg Bishop Blake Booth Bowen Boyd Bradley Brandt Brennan Brooks Brown Bryant
        Burke Burns Burton Butler Calder Campbell Cardoso Carlson Carr Carter Castillo Chambers
        Chan Chandra Chavez Chen Christensen Clark Clarke Cohen Coleman Collins Conrad Cooper
        Costa Crawford Cruz Curtis Dalton Das Davies Dawson Delgado Dixon Doyle Dubois Duncan
        Dunn Eaton Edwards Elliott Ellis Engel Eriksson Evans Farrell Ferguson Fernandes Fischer
        Fisher Fleming Fletcher Flynn Forbes Ford Foster Fowler Fraser Freeman Fuentes Fuller
        Gallagher Garcia Gardner Gibson Gill Goldberg Gomez Gonzalez Goodwin Gordon Grant Gray
        Green Griffin Gupta Hale Hall Hamilton Hansen Harper Harris Harrison Hart Hayes
        Henderson Hernandez Hoffman Holland Holm Holmes Hopkins Howard Huang Hughes Hunt Ibarra
        Ingram Ito Jackson Jansen Jenkins Jensen Johansson Johnson Jones Jordan Kapoor Kaur
        Keller Kelly Kennedy Khan Kim King Klein Knight Kovac Kumar Lambert Larsen Lawson Lee
        Lewis Lindgren Lopez Lynch
        """
    ),
    cities=words_of(
        """
        Aberdeen Accra Adelaide Albany Algiers Amman Amsterdam Ankara Antwerp Athens Atlanta
        Auckland Austin Baghdad Baltimore Bangkok Barcelona Basel Bath Beijing Beirut Belfast
        Belgrade Bergen Berlin Bern Birmingham Bogota Bologna Bordeaux Boston Bradford Bremen
        Brighton Brisbane Bristol Brussels Bucharest Budapest Buffalo Cairo Calgary Cambridge
        Canberra Caracas Cardiff Casablanca Charlotte Chennai Chester Chicago Cincinnati
        Cleveland Cologne Copenhagen Cordoba Coventry Dakar Dallas Damascus Darwin Delhi Denver
        Derby Detroit Dhaka Doha Dortmund Dover Dresden Dubai Dublin Dundee Durban Durham
        Edinburgh Edmonton Essen Exeter Fargo Florence Frankfurt Fresno Galway Gdansk Geneva
        Genoa Ghent Glasgow Gothenburg Granada Graz Grenoble Halifax Hamburg Hanoi Hanover
        Havana Helsinki Hobart Honolulu Houston Hull Innsbruck Istanbul Jakarta Jerusalem
        Johannesburg Kabul Karachi Kathmandu Kingston Kolkata Kyoto Lagos Lahore Lancaster
        Lausanne Leeds Leicester Leipzig Lille Lima Lincoln Linz Liverpool Lucerne Lusaka Lyon
        Madrid Malaga Malmo Manchester Manila Maputo Marseille Melbourne Memphis Miami Milan
        Milwaukee Minsk Monterrey Montreal Moscow Mumbai Munich Nagoya Nairobi Nantes Naples
        Nashville Newcastle Nice Norwich Nottingham
        """
    ),
    jobs=words_of(
        """
        accountant actor actuary analyst animator archaeologist architect artist astronomer
        athlete auctioneer author barber bartender biologist blacksmith bookkeeper botanist
        bricklayer broker builder butcher carpenter cartographer cashier chef chemist
        choreographer cleaner clerk coach comedian composer conductor consultant cook coroner
        counsellor courier critic curator dancer dentist designer detective dietitian diplomat
        director diver doctor dramatist driver economist editor electrician engineer
        entrepreneur farmer firefighter fisherman florist forester gardener geographer geologist
        glazier goldsmith grocer hairdresser historian illustrator inspector instructor
        interpreter inventor investor janitor jeweller jockey joiner journalist judge juggler
        laborer landlord lawyer lecturer
        """
    ),
)
